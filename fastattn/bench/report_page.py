"""The frame of a report page: its styles, and the script that draws its figures. Used by report.py alone."""

from __future__ import annotations

from string import Template

__all__ = ["PAGE"]

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root { --page: #ffffff; --panel: #f6f7f9; --ink: #1d232b; --soft: #5b6673; --grid: #dfe3e8;
        --accent: #0f766e; --plain: #9aa5b1; --good: #0f766e; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --panel: #1c2229; --ink: #e6eaef; --soft: #9aa7b4; --grid: #303843;
          --accent: #2dd4bf; --plain: #6b7885; --good: #2dd4bf; --bad: #ff8a7a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color:
var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; max-width: 62rem; overflow-wrap: anywhere; }
.summary { background: var(--panel); border-left: 4px solid var(--accent); border-radius: 4px;
           padding: .8rem 1rem .8rem 2rem; margin: 0; }
.summary li { margin: .2rem 0; }
.note { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; min-width: 40%; }
th, td { text-align: left; vertical-align: top; white-space: nowrap; padding: .38rem .8rem .38rem 0;
         border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.long { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
td + td, th + th { padding-left: .8rem; }
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--bad); font-weight: 600; }
td.muted, .environment td:first-child { color: var(--soft); }
.environment { font-size: .86rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem; }
.plots section { min-width: 0; }
.figure { width: 100%; }
</style>
</head>
<body>
<h1>$title</h1>
$summary
$body
<script>$plotly</script>
<script>
(function () {
  if (typeof Plotly === "undefined") return;
  function theme(value, colours) {
    if (Array.isArray(value)) return value.map(function (each) { return theme(each, colours); });
    if (value && typeof value === "object") {
      var copy = {};
      for (var key in value) {
        var isColour = key === "color";
        var each = value[key];
        if (isColour && Array.isArray(each)) copy[key] = each.map(function (role) { return colours[role]; });
        else if (isColour) copy[key] = colours[each];
        else copy[key] = theme(each, colours);
      }
      return copy;
    }
    return value;
  }
  function draw() {
    var style = getComputedStyle(document.documentElement);
    var colours = {};
    ["accent", "plain", "ink", "grid", "soft"].forEach(function (role) {
      colours[role] = style.getPropertyValue("--" + role).trim();
    });
    document.querySelectorAll(".figure").forEach(function (element) {
      if (!element.source) element.source = JSON.parse(element.querySelector("script").textContent);
      var figure = theme(element.source, colours);
      var axis = { gridcolor: colours.grid, zerolinecolor: colours.grid, automargin: true };
      var layout = figure.layout;
      layout.xaxis = Object.assign({}, axis, layout.xaxis);
      layout.yaxis = Object.assign({ autorange: "reversed" }, axis, { showgrid: false, ticksuffix: "  " },
      layout.yaxis); if (layout.yaxis.range) delete layout.yaxis.autorange;
      Object.assign(layout, {
        height: figure.height, showlegend: false, bargap: 0.38, margin: { l: 10, r: 10, t: 10, b: 45 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colours.ink, size: 13, family: getComputedStyle(document.body).fontFamily }
      });
      Plotly.react(element, figure.data, layout, { responsive: true, displayModeBar: false });
    });
  }
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
</script>
</body>
</html>
"""
)
