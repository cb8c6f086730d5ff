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
        --accent: #0f766e; --plain: #9aa5b1; --good: #0f766e; --bad: #b42318;
        --s0: #0f766e; --s1: #c2410c; --s2: #1d4ed8; --s3: #9333ea;
        --s4: #be185d; --s5: #4d7c0f; --s6: #a16207; --s7: #475569; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --panel: #1c2229; --ink: #e6eaef; --soft: #9aa7b4; --grid: #303843;
          --accent: #2dd4bf; --plain: #6b7885; --good: #2dd4bf; --bad: #ff8a7a;
          --s0: #2dd4bf; --s1: #fb923c; --s2: #7ab0ff; --s3: #c792fb;
          --s4: #f78fc0; --s5: #a3e635; --s6: #fcd34d; --s7: #a9b6c6; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 80rem; background: var(--page);
       color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; max-width: 62rem; overflow-wrap: anywhere; }
.summary { background: var(--panel); border-left: 4px solid var(--accent); border-radius: 4px;
           padding: .8rem 1rem .8rem 2rem; margin: 0; }
.summary li { margin: .2rem 0; }
.note { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; min-width: 40%; }
th, td { text-align: left; vertical-align: top; white-space: nowrap; padding: .38rem .6rem .38rem 0;
         border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
/* A wide table scrolls under its first column, so that a row keeps its name. */
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
td.long { white-space: normal; min-width: 26rem; overflow-wrap: anywhere; }
td + td, th + th { padding-left: .8rem; }
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--bad); font-weight: 600; }
td.muted, .environment td:first-child { color: var(--soft); }
.environment { font-size: .86rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem; }
.plots section { min-width: 0; }
.figure { width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .9rem; margin: .1rem 0 .3rem; }
.legend button { display: flex; align-items: center; gap: .4rem; padding: .1rem 0; border: 0;
                 background: none; color: var(--ink); font: inherit; font-size: .84rem; text-align: left;
                 cursor: pointer; overflow-wrap: anywhere; }
.legend button[aria-pressed="false"] { opacity: .4; text-decoration: line-through; }
.legend i { flex: none; width: 1.3rem; border-top: 3px solid; }
@media (max-width: 40rem) { body { padding: 1.25rem .8rem 3rem; } h1 { font-size: 1.4rem; }
  td.long { min-width: 16rem; }
  td:first-child, td.long:first-child { white-space: normal; min-width: 9.5rem; overflow-wrap: anywhere; } }
@media print { .legend button { opacity: 1; } }
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
        var isColour = key === "color" || key === "bgcolor";
        var each = value[key];
        if (isColour && Array.isArray(each)) copy[key] = each.map(function (role) { return colours[role]; });
        else if (isColour) copy[key] = colours[each];
        else copy[key] = theme(each, colours);
      }
      return copy;
    }
    return value;
  }
  // Buttons in place of plotly's own legend: they wrap on a narrow screen and work from the keyboard.
  function legend(element, figure) {
    var entries = figure.data.filter(function (trace) { return trace.showlegend; });
    if (entries.length < 2) return;
    if (!element.legend) {
      element.hiddenGroups = {};
      element.legend = document.createElement("div");
      element.legend.className = "legend";
      element.parentNode.insertBefore(element.legend, element.nextSibling);
      entries.forEach(function (trace) {
        var button = document.createElement("button"), name = document.createElement("span");
        name.innerHTML = trace.name;  // escaped where the page was written
        button.append(document.createElement("i"), name);
        button.type = "button";
        button.addEventListener("click", function () {
          element.hiddenGroups[trace.legendgroup] = !element.hiddenGroups[trace.legendgroup];
          draw();
        });
        element.legend.append(button);
      });
    }
    entries.forEach(function (trace, index) {
      var button = element.legend.children[index];
      button.setAttribute("aria-pressed", String(!element.hiddenGroups[trace.legendgroup]));
      button.firstChild.style.borderTopColor = (trace.marker || trace.line).color;
      var styles = { dash: "dashed", dot: "dotted", dashdot: "double" };
      button.firstChild.style.borderTopStyle = styles[trace.line && trace.line.dash] || "solid";
    });
    figure.data.forEach(function (trace) {
      if (element.hiddenGroups[trace.legendgroup]) trace.visible = false;
    });
  }
  function draw() {
    var style = getComputedStyle(document.documentElement);
    var colours = {};
    ["accent", "plain", "bad", "ink", "page", "grid", "soft", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"]
      .forEach(function (role) { colours[role] = style.getPropertyValue("--" + role).trim(); });
    document.querySelectorAll(".figure").forEach(function (element) {
      if (!element.source) element.source = JSON.parse(element.querySelector("script").textContent);
      var figure = theme(element.source, colours);
      legend(element, figure);
      var axis = { gridcolor: colours.grid, zerolinecolor: colours.grid, automargin: true };
      var layout = figure.layout;
      layout.xaxis = Object.assign({}, axis, layout.xaxis);
      layout.yaxis = Object.assign({}, axis, layout.yaxis);
      Object.assign(layout, {
        height: figure.height, showlegend: false, margin: { l: 10, r: 10, t: 10, b: 45 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
        hoverlabel: { align: "left" },
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
