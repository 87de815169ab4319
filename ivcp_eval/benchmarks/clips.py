"""Videos as frames and when each is shown: decoded from a file with PyAV, or pictures with stated times.

A file is read twice: its packets for the times of all frames, then the frames that were chosen, so that no more than
these are ever held. Times are those of the stream, counted from its first frame, however uneven they are.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.interface.failures import InputRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Of the frames that are held: 2 GiB.
MOST_BYTES = 2 << 30
DEFAULT_FRAMES = 8
ADVICE = "pip install 'ivcp-eval[video]'"


class VideoRefused(InputRefused):
    """A video that no question can be asked about."""


class NoDecoder(VideoRefused):
    """PyAV is not installed."""


class DamagedVideo(VideoRefused):
    """A file that is no video, or is cut off or damaged."""


class NoVideoStream(VideoRefused):
    """A file that holds sound alone."""


class NoFrames(VideoRefused):
    """A video without a single frame."""


class TooManyFrames(VideoRefused):
    """More frames were asked for than fit in memory."""


class OtherFrames(VideoRefused):
    """Decoding gave other frames than those that were noted: another decoder, or a file that was changed."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a file are shown; one of the two is set.

    Attributes:
        nframe: so many, at the places ``i * n // (nframe + 1)`` of n, as VLMEvalKit takes them; all of a video that has
            no more. fps: what is seen every ``1 / fps`` seconds.
    """

    nframe: int = 0
    fps: float = 0.0

    def __post_init__(self) -> None:
        whole = isinstance(self.nframe, int) and not isinstance(self.nframe, bool) and self.nframe >= 0
        finite = isinstance(self.fps, int | float) and not isinstance(self.fps, bool) and 0 <= self.fps < math.inf
        if not whole or not finite or bool(self.nframe) == bool(self.fps):
            raise ValueError(
                f"got nframe {self.nframe!r} and fps {self.fps!r}; give one of them: a whole number of frames above 0, "
                "or frames a second above 0"
            )

    def __str__(self) -> str:
        """As `of` reads it."""
        return f"nframe={self.nframe}" if self.nframe else f"fps={self.fps}"

    @classmethod
    def of(cls, words: str) -> Sampling:
        """Of ``nframe=8`` or ``fps=1``. Raises ValueError."""
        name, _, number = words.partition("=")
        if name not in ("nframe", "fps"):
            raise ValueError(f"got {words!r}, expected nframe=8 or fps=1")
        return cls(nframe=int(number)) if name == "nframe" else cls(fps=float(number))

    def places(self, times: Sequence[float]) -> list[int]:
        """Which of the frames, shown at ``times`` (increasing, from 0), are taken; at least one, none twice."""
        n = len(times)
        if self.nframe >= n:
            return list(range(n))
        if self.nframe:
            return [int(i * n / (self.nframe + 1)) for i in range(1, self.nframe + 1)]
        seen = (bisect_right(times, i / self.fps) - 1 for i in range(int(times[-1] * self.fps) + 1))
        return list(dict.fromkeys(seen))


@dataclass(frozen=True)
class Clip:
    """What is shown of a video.

    Attributes:
        frames: (T, H, W, 3) uint8. seconds: when each is shown, from the first frame of the video.
        motion: (T, rows, columns) float32, how far its blocks moved (`motion.Motion`), if that was asked for.
    """

    frames: NDArray[np.uint8]
    seconds: list[float]
    motion: NDArray[np.float32] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the pixels, their shape and the times."""
        import numpy as np

        found = hashlib.sha256(f"{self.frames.shape} {self.seconds}".encode())
        found.update(np.ascontiguousarray(self.frames).data)
        return found.hexdigest()


def decoder() -> str:
    """Who decodes, with versions, as results note it. Raises NoDecoder."""
    av = _av()
    return f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"


def opened(part: Mapping[str, Any], moving: bool = False) -> dict[str, Any]:
    """A video of a prompt with its frames.

    Args:
        part: ``video`` is the path of a file, with ``nframe`` or ``fps``, or a list of paths of pictures, with
            ``seconds`` and perhaps ``geometry`` (`geometry.packed`); anything else is decoded already.
            ``frames_sha256``: what `Clip.digest` must be.
        moving: whether to find how far blocks moved too, as the part's ``motion``.

    Raises:
        VideoRefused: see its subclasses. ValueError: a geometry of other frames. OSError: a file is not here, or a
            picture cannot be decoded.
    """
    source = part["video"]
    if isinstance(source, str | Path):
        clip = decode(Path(source), Sampling(part.get("nframe", 0), part.get("fps", 0.0)), moving)
    elif isinstance(source, list) and source and all(isinstance(name, str | Path) for name in source):
        clip = pictures(list(map(Path, source)), part.get("seconds", ()))
    else:
        return dict(part)
    recorded = part.get("frames_sha256")
    if recorded and recorded != clip.digest:
        raise OtherFrames(
            f"{source}: its frames are not those that were recorded ({recorded[:12]}...); add the file again"
        )
    found: dict[str, Any] = {"video": clip.frames, "seconds": clip.seconds}
    if packed := part.get("geometry"):
        from ivcp_eval.benchmarks import geometry

        found["geometry"] = geometry.read(packed, len(clip.seconds))
    if not moving:
        return found
    from ivcp_eval.benchmarks.motion import of_frames

    return {**found, "motion": of_frames(_av(), clip.frames) if clip.motion is None else clip.motion}


def pictures(paths: Sequence[Path], seconds: Sequence[float]) -> Clip:
    """Pictures of one size as the frames of a video.

    Raises:
        NoFrames: there are none. VideoRefused: sizes differ, or times are not one for each, increasing from 0 or later.
    """
    import numpy as np

    check_times(len(paths), seconds)
    images = [decoded(path) for path in paths]
    if len(sizes := {image.size for image in images}) > 1:
        raise VideoRefused(f"the frames of a video have the sizes {sorted(sizes)}; make them one")
    return Clip(np.stack([np.asarray(image) for image in images]), list(map(float, seconds)))


def check_times(n: int, seconds: Sequence[float]) -> None:
    """Raise as `pictures` unless these are the times of ``n`` frames."""
    if not n:
        raise NoFrames("a video without frames; give at least one picture")
    if len(seconds) != n:
        raise VideoRefused(f"{len(seconds)} times for {n} frames; say in seconds when each is shown")
    if not all(math.isfinite(at) and at >= 0 for at in seconds) or any(b <= a for a, b in pairwise(seconds)):
        raise VideoRefused(f"the times of frames must increase from 0 or later, got {list(seconds[:8])}")


def decode(path: Path, sampling: Sampling, moving: bool = False, glancing: bool = False) -> Clip:
    """The frames of a file that are to be shown, upright; ``moving``: with their motion, if its codec tells.

    Args:
        glancing: leap from key frame to key frame, which is fast in long videos; for people to look at, since what lies
            between them, and may be damaged, is not read.

    Raises:
        FileNotFoundError: no such file. VideoRefused: see its subclasses.
    """
    av = _av()
    if not path.is_file():
        raise FileNotFoundError(f"video {path} is not here, or is no file")
    with _damage(av, path):
        stamps = _packet_stamps(av, path) or _frame_stamps(av, path)
        clip = _glanced(av, path, stamps, sampling) if glancing else None
        clip = clip or _chosen(av, path, stamps, sampling, moving)
        if clip is None:  # packets that give no frame, such as those before the first key frame
            clip = _chosen(av, path, _frame_stamps(av, path), sampling, moving)
    if clip is None:
        raise DamagedVideo(f"video {path}: frames that are there cannot be decoded a second time; convert it anew")
    return clip


def pixels(part: Mapping[str, Any]) -> int:
    """About how many pixels `opened` will give, from headers alone. Raises as `opened`."""
    from PIL import Image

    source = part["video"]
    if isinstance(source, list):
        with Image.open(source[0]) as image:
            return image.width * image.height * len(source)
    av, path = _av(), Path(source)
    with _damage(av, path), _stream(av, path) as (_, stream):
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        frames = part.get("nframe") or max(1, int(seconds * part.get("fps", 0.0)))
        return int(stream.width * stream.height * min(frames, stream.frames or frames))


def _chosen(av: Any, path: Path, stamps: list[int], sampling: Sampling, moving: bool) -> Clip | None:
    """The frames at the places of ``stamps`` that are taken; None where one of them cannot be decoded."""
    import numpy as np

    from ivcp_eval.benchmarks.motion import Motion

    if not stamps:
        raise NoFrames(f"video {path} has no frames")
    with _stream(av, path) as (container, stream):
        seconds = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
        places = sampling.places(seconds)
        size = 3 * stream.width * stream.height * len(places)
        if size > MOST_BYTES:
            raise TooManyFrames(
                f"video {path}: {len(places)} frames of {stream.width} x {stream.height} pixels take {size >> 20} MiB, "
                f"more than {MOST_BYTES >> 20}; show fewer of them (nframe, fps)"
            )
        requested, found = {stamps[place] for place in places}, {}
        last, motion = max(requested), Motion() if moving else None
        if motion:
            motion.exported(stream.codec_context)
        for frame in container.decode(stream):
            new = frame.pts in requested and frame.pts not in found
            if new:
                found[frame.pts] = _upright(frame)
            if motion:
                motion.see(frame, new)
            if frame.pts is not None and frame.pts >= last:
                break
    if len(found) < len(requested):
        return None
    return Clip(
        np.stack([found[stamps[place]] for place in places]),
        [seconds[place] for place in places],
        np.stack(motion.steps) if motion and motion.found else None,
    )


def _glanced(av: Any, path: Path, stamps: list[int], sampling: Sampling) -> Clip | None:
    """As `_chosen`, each frame from the key frame before it; None where the file cannot be entered so."""
    import numpy as np

    if not stamps:
        return None
    found = []
    with _stream(av, path) as (container, stream):
        seconds = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
        places = sampling.places(seconds)
        try:
            for place in places:
                # A leap may end behind its aim where frames are stored in another order than they are shown.
                for before in (0, 8, 64, place):
                    container.seek(stamps[max(0, place - before)], stream=stream)
                    later = (f for f in container.decode(stream) if f.pts is not None and f.pts >= stamps[place])
                    frame = next(later, None)
                    if frame is not None and frame.pts == stamps[place]:
                        found.append(_upright(frame))
                        break
                else:
                    return None
        except av.error.FFmpegError:
            return None
    return Clip(np.stack(found), [seconds[place] for place in places])


def _upright(frame: Any) -> NDArray[np.uint8]:
    """A frame as it is to be seen: telephones note how they were held."""
    import numpy as np

    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _packet_stamps(av: Any, path: Path) -> list[int]:
    """Times of all frames, in units of the stream, sorted; empty where the container does not tell them.

    Raises:
        DamagedVideo: the container holds fewer frames than its header says.
    """
    with _stream(av, path) as (container, stream):
        packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
        if stream.frames and len(packets) < stream.frames:
            raise DamagedVideo(
                f"video {path} is cut off: it holds {len(packets)} of {stream.frames} frames; get it again"
            )
    shown = [stamp for stamp, discarded in packets if not discarded]
    return sorted(set(shown)) if None not in shown else []


def _frame_stamps(av: Any, path: Path) -> list[int]:
    """The same, of the frames themselves."""
    with _stream(av, path) as (container, stream):
        return sorted({frame.pts for frame in container.decode(stream) if frame.pts is not None})


@contextmanager
def _stream(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream; a cover picture is none."""
    with av.open(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            what = "sound alone" if container.streams.audio else "no video"
            raise NoVideoStream(f"{path} holds {what}; a video is expected")
        yield container, streams[0]


@contextmanager
def _damage(av: Any, path: Path) -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, EOFError) as error:
        reason = str(error).replace(f"'{path}'", "").strip(": ")
        raise DamagedVideo(f"video {path} cannot be decoded ({reason}); it is damaged, or no video") from error


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise NoDecoder(f"no decoder of videos is installed ({error}); {ADVICE}") from error
    return av
