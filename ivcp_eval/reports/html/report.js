// Plots, sorting, filters, and the cells that each cut kept. Text from results only ever becomes text (textContent).
"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specs = read("charts");
const SVG = "http://www.w3.org/2000/svg";

// -- plots ------------------------------------------------------------------------------------------------------------

function plot(place) {
  if (place.dataset.drawn || place.closest("[hidden]")) return;
  place.dataset.drawn = "yes";
  const actions = { export: true, source: false, compiled: false, editor: false };
  // ast: expressions are interpreted, so that the page needs no eval.
  vegaEmbed(place, specs[place.dataset.chart], { renderer: "svg", ast: true, actions }).then(
    () => {
      place.querySelector("summary")?.setAttribute("aria-label", "Save this plot");
      place.dataset.drawn = "done";
    },
    (error) => {
      place.textContent = `This plot cannot be drawn: ${error.message}`;
      place.dataset.drawn = "failed";
    },
  );
}

for (const choice of document.querySelectorAll("select[data-shows]")) {
  const update = () => {
    for (const part of document.querySelectorAll(`[data-of="${choice.dataset.shows}"]`)) {
      part.hidden = part.dataset.value !== choice.value;
      part.querySelectorAll(".chart").forEach(plot);
    }
  };
  choice.addEventListener("change", update);
  update();
}
document.querySelectorAll(".chart").forEach(plot);

// -- table ------------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    const rows = [...body.rows].map((row) => [value(row), row]);
    const numeric = head.classList.contains("n");
    rows.sort(([a], [b]) => {
      if (!numeric) return (down ? -1 : 1) * a.localeCompare(b);
      if (a === "" || b === "") return (a === "") - (b === ""); // what is missing stays last
      return (down ? -1 : 1) * (Number(a) - Number(b));
    });
    body.append(...rows.map(([, row]) => row));
  });
}

// -- flips ------------------------------------------------------------------------------------------------------------

const filters = [...document.querySelectorAll("select[data-filter]")];
const cards = [...document.querySelectorAll("#flips .card")];
function filter() {
  let shown = 0;
  for (const card of cards) {
    card.hidden = filters.some((one) => one.value && card.dataset[one.dataset.filter] !== one.value);
    shown += !card.hidden;
  }
  const said = document.getElementById("flips-shown");
  if (said) said.textContent = `${shown} of ${cards.length} cards`;
}
filters.forEach((one) => one.addEventListener("change", filter));
filter();

// -- pictures ---------------------------------------------------------------------------------------------------------

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// One path of rectangles: cells of a grid that covers [x0, y0, x1, y1] of a picture of w x h.
function cells(numbers, shown, w, h) {
  const [rows, columns] = shown.grid;
  const [x0, y0, x1, y1] = shown.covers;
  const [wide, high] = [((x1 - x0) * w) / columns, ((y1 - y0) * h) / rows];
  const at = (n) => [x0 * w + (n % columns) * wide, y0 * h + Math.floor(n / columns) * high];
  const round = (value) => Math.round(value * 100) / 100;
  return numbers.map((n) => `M${at(n).map(round).join(" ")}h${round(wide)}v${round(high)}h${round(-wide)}z`).join("");
}

function frame(box, kind, w, h) {
  const [x0, y0, x1, y1] = box;
  const size = { x: x0 * w, y: y0 * h, width: Math.max(0, x1 - x0) * w, height: Math.max(0, y1 - y0) * h };
  return element("rect", { ...size, class: kind, fill: "none", "stroke-width": w / 120 });
}

function draw(card, picture) {
  const svg = card.querySelector("svg");
  const [variant, slider] = [card.querySelector("select"), card.querySelector("input")];
  const [w, h] = picture.size;
  const shown = picture.shown[Number(variant.value)];
  slider.max = shown.cuts.length;
  slider.disabled = !shown.cuts.length;
  const cut = shown.cuts[Number(slider.value) - 1];
  const [x0, y0, x1, y1] = shown.covers;
  const [left, top] = [Math.min(0, x0) * w, Math.min(0, y0) * h];
  svg.setAttribute("viewBox", [left, top, Math.max(1, x1) * w - left, Math.max(1, y1) * h - top].join(" "));
  svg.querySelectorAll("path, rect").forEach((part) => part.remove());
  const draws = cut && shown.grid;
  const dropped = draws ? cells(cut.dropped, shown, w, h) : "";
  const merged = draws ? cells(cut.merged, shown, w, h) : "";
  svg.append(element("path", { class: "dropped", d: dropped, fill: "#000", "fill-opacity": 0.78 }));
  svg.append(element("path", { class: "merged", d: merged, fill: "none", stroke: "#35c9ff", "stroke-width": w / 400 }));
  const boxes = [[picture.box, "gold"], [picture.shown[0].box, "baseline"], [shown.box, "pruned"]];
  const colours = { gold: "#3ddc5b", baseline: "#ffffff", pruned: "#ff9d00" };
  for (const [box, kind] of boxes) {
    if (!box) continue;
    const drawn = frame(box, kind, w, h);
    drawn.setAttribute("stroke", colours[kind]);
    if (kind === "baseline") drawn.setAttribute("stroke-dasharray", w / 40);
    svg.append(drawn);
  }
  let said = `${shown.tokens} tokens, none cut`;
  if (!shown.tokens) said = "which tokens were kept was not recorded";
  if (shown.cuts.length && !cut) said = `${shown.tokens} tokens before the first cut`;
  if (cut) said = `before layer ${cut.layer}: ${cut.kept} of ${shown.tokens} tokens kept`;
  const part = picture.drawn < picture.frames ? " of the drawn ones" : "";
  if (cut && cut.merged.length) said += `, ${cut.merged.length}${part} merged into others`;
  if (cut && cut.by_frame.length) said += `; by frame ${cut.by_frame.join(", ")}`;
  if (cut && !shown.grid) said += "; how they lie in the picture is not known";
  card.querySelector("output").textContent = said;
  svg.setAttribute("aria-label", `Picture; ${shown.variant}: ${said}`);
  card.querySelector(".answer").textContent = shown.answer;
  const iou = card.querySelector(".iou");
  if (iou) iou.textContent = shown.iou === null ? "none" : shown.iou.toFixed(3);
}

const pictures = read("pictures");
for (const card of document.querySelectorAll(".picture")) {
  const picture = pictures[card.id];
  const [variant, slider] = [card.querySelector("select"), card.querySelector("input")];
  variant.addEventListener("change", () => {
    slider.max = picture.shown[Number(variant.value)].cuts.length;
    slider.value = slider.max;
    draw(card, picture);
  });
  slider.addEventListener("input", () => draw(card, picture));
  slider.max = picture.shown[Number(variant.value)].cuts.length;
  slider.value = slider.max;
  draw(card, picture);
}
document.documentElement.dataset.ready = "yes";
