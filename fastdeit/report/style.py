"""The page's style sheet, and the script that draws its figures."""

CSS = """
:root { color-scheme: light dark; --text: #1d2126; --soft: #5a636d; --line: #d5dae0; --back: #ffffff; --panel: #f5f7f9;
  --link: #1f5fae; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #a3adb8; --line: #3a424b; --back: #14181c;
  --panel: #1e2429; --link: #7fb2f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; max-width: 76rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .4rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: 0; padding: 0; }
p, figcaption, .note { max-width: 60rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  min-width: 4.5rem; }
th { overflow-wrap: break-word; }
tbody th { font-weight: 600; }
td { max-width: 44rem; }
td:last-child:not(.number) { min-width: 9rem; }
td.number, th.number { text-align: right; min-width: 0; overflow-wrap: normal; }
code { font: .85em/1.4 ui-monospace, monospace; background: var(--panel); padding: .1em .3em; border-radius: .2em; }
figure { margin: .5rem 0 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem; }
.plots > figure, .plot { min-width: 0; }
.plot { min-height: 18rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .75rem; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; height: auto; display: block; border-radius: .25rem; background: var(--panel); }
.pictures img.small { image-rendering: pixelated; }
.pictures figcaption { font-size: .75rem; line-height: 1.3; margin-top: .25rem; }
.three { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 2rem; }
.three .pictures { grid-template-columns: repeat(auto-fit, minmax(5rem, 1fr)); gap: .4rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
@media print { nav, .skip { display: none; } }
"""

# Figures take their colours from the style sheet, so they follow a switch between light and dark.
SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const template = () => {
  const style = getComputedStyle(document.documentElement);
  const [text, line, back] = ["--soft", "--line", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line};
  const clear = "rgba(0,0,0,0)";
  const numbers = {textfont: {color: style.getPropertyValue("--text").trim()}};
  return {data: {heatmap: [numbers]}, layout: {
    font: {color: text, family: "system-ui, sans-serif", size: 12},
    paper_bgcolor: clear, plot_bgcolor: clear, xaxis: axis, yaxis: axis,
    hoverlabel: {bgcolor: back, bordercolor: line, font: {color: text}}}};
};
const options = {responsive: true, displaylogo: false, displayModeBar: false};
for (const [id, {data, layout}] of Object.entries(figures))
  Plotly.newPlot(id, data, {...layout, template: template()}, options);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const id of Object.keys(figures)) Plotly.relayout(id, {template: template()});
});
"""
