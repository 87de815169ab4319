"""A report as one static HTML file: verdict, plots, flips, pictures of what was kept, provenance."""
