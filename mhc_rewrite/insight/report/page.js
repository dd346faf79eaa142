"use strict";
// Draws what the page's data hold, with Plotly: what is near the window first, the rest when there is nothing to do.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, cards = Object.fromEntries(data.cards.map(card => [card.key, card]));
const two = runs.length === 2;
document.body.classList.add(two ? "two" : "one");
const slider = document.getElementById("moment");
let paper = false;

// -- numbers ----------------------------------------------------------------------------------------------------------

const unpacked = new WeakMap();

function unpack(packed) {  // rows of numbers; null where there is none; logarithms stay logarithms
  if (unpacked.has(packed)) return unpacked.get(packed);
  const bytes = Uint8Array.from(atob(packed.codes), letter => letter.charCodeAt(0));
  const codes = new Uint16Array(bytes.buffer), width = packed.rows ? codes.length / packed.rows : 0;
  const scale = (packed.high - packed.low) / 65534;
  const rows = Array.from({length: packed.rows}, (_, row) =>
    Array.from(codes.subarray(row * width, (row + 1) * width), code => code === 65535 ? null : packed.low + code * scale));
  unpacked.set(packed, rows);
  return rows;
}

const short = value => value === null || value === undefined ? "none"
  : Math.abs(value) >= 1000 && Math.abs(value) < 1e7 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));

// -- looks ------------------------------------------------------------------------------------------------------------

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const LIGHT = {ink: "#1c2330", soft: "#5a6475", line: "#dfe3ea", card: "#ffffff", low: "#eef2f8", middle: "#6f9be0",
  high: "#12397f", minus: "#b4500b", run0: "#2257c4", run1: "#c2570c", second0: "#0c8a7b", second1: "#a33d7c",
  third0: "#7a4fd0", third1: "#8a6d00"};

function look() {
  if (paper) return LIGHT;
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(Object.keys(LIGHT).map(name => [name, style.getPropertyValue("--" + name).trim()]));
}

function layout(more) {
  const {ink, soft, line, card} = look();
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: {color: soft, size: 11},
    title: {font: {color: soft, size: 11}}, automargin: true};
  const made = {font: {family: FONT, color: ink, size: 12}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 8, r: 8, t: 6, b: 8}, hoverlabel: {bgcolor: card, bordercolor: line, font: {color: ink}}, dragmode: false,
    ...more};
  for (const name of ["xaxis", "yaxis"]) made[name] = {...axis, ...(more[name] || {})};
  return made;
}

function colours(low) {  // of a heat map: from nothing to much; on both sides of 0 where there is less than nothing
  const {low: pale, middle, high, minus} = look();
  return low < 0 ? [[0, minus], [0.5, pale], [1, high]] : [[0, pale], [0.5, middle], [1, high]];
}

const range = (low, high) => low < 0 ? [-Math.max(-low, high), Math.max(-low, high)] : [low, high];
const faint = colour => colour + "26";
// On paper the width of a page of A4, whatever the window's.
const room = place => paper ? Math.min(680, place.clientWidth || 680) : place.clientWidth || 600;
const CONFIG = {displayModeBar: false, responsive: false, showTips: false};

// -- lines over the steps ---------------------------------------------------------------------------------------------

const WORDS = {median: "median over sites", largest: "largest over sites"};

function lines(place) {
  const shown = look(), traces = [], key = place.dataset.lines, card = cards[key], keys = [];
  const add = (points, name, colour, more) => {
    traces.push({x: points[0], y: points[1], name, mode: points[0].length < 2 ? "markers" : "lines",
      line: {color: colour, width: 1.6}, marker: {color: colour},
      hovertemplate: "%{y:.4~g}<extra>" + escaped(name) + "</extra>", ...more});
  };
  // One run has a colour for each figure, two have a colour each and figures differ by their dashes.
  const names = ["run", "second", "third"], dashes = ["solid", "dot", "dash"];
  runs.forEach((run, number) => {
    const of = two ? ", " + run.name : "";
    if (key === "loss") {
      if (run.loss) add(run.loss, "loss" + of, shown["run" + number]);
      return;
    }
    Object.entries(card.lines).forEach(([figure, label], place) => {
      const found = run.lines[figure], colour = two ? shown["run" + number] : shown[names[place] + "0"];
      const dash = two ? dashes[place] : "solid";
      if (!found) return;
      if (found.smallest && found.largest && card.of === "median" && run.sites.length > 1) {
        const edge = {line: {width: 0}, hoverinfo: "skip", mode: "lines"};
        add(found.smallest, "smallest", colour, edge);
        add(found.largest, "largest", colour, {...edge, fill: "tonexty", fillcolor: faint(colour)});
      }
      add(found[card.of], label + of, colour, {line: {color: colour, width: 1.6, dash}});
      if (!number && Object.keys(card.lines).length > 1) keys.push([two ? shown.soft : colour, dash, label]);
    });
  });
  if (two) keys.push(...runs.map((run, number) => [shown["run" + number], "", run.name]));
  legend(place, keys);
  const values = traces.flatMap(trace => trace.y), positive = values.filter(value => value > 0);
  const ratio = positive.reduce((a, b) => Math.max(a, b), 0) / positive.reduce((a, b) => Math.min(a, b), Infinity);
  const log = card && card.log && positive.length > 0 && ratio > 3;
  if (log) for (const trace of traces) trace.y = trace.y.map(value => value > 0 ? value : null);
  return [traces, layout({
    ...(card ? {margin: {...aligned(place), t: 6, b: 8}} : {}), hovermode: "x unified", showlegend: false,
    xaxis: {title: {text: "step", standoff: 4, font: {color: shown.soft, size: 11}}, hoverformat: ",d", range: STEPS},
    yaxis: {type: log ? "log" : "linear", exponentformat: "power", nticks: 6, automargin: !card,
      title: {text: card ? WORDS[card.of] : "loss", standoff: 6, font: {color: shown.soft, size: 11}},
      ...(log && ratio > 30 ? {dtick: 1} : {})},
  })];
}

function legend(place, keys) {  // above the lines, where it may take as many rows as it needs
  let shown = place.previousElementSibling;
  if (!shown || shown.className !== "lines") place.before(shown = Object.assign(document.createElement("div"), {className: "lines"}));
  const pattern = {solid: "", dot: "2 3", dash: "7 4"};
  shown.innerHTML = keys.map(([colour, dash, label]) => "<span>" + (dash === ""
    ? `<svg width="10" height="10"><circle cx="5" cy="5" r="4.5" fill="${colour}"/></svg>`
    : `<svg width="22" height="10"><path d="M0 5H22" stroke="${colour}" stroke-width="2" stroke-dasharray="${pattern[dash]}"/></svg>`)
    + escaped(label) + "</span>").join("");
}

// The steps of the lines stand over those of the heat map below.
const aligned = place => room(place) < 480 ? {l: 62, r: 58} : {l: 104, r: 72};
const first = Math.min(...runs.map(run => run.spans[0])), last = Math.max(...runs.map(run => run.last));
const STEPS = last > first ? [first, last] : [first - 1, first + 1];

const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

// -- heat maps over steps and depth -----------------------------------------------------------------------------------

function ticks(sites, most, letters = 16) {  // some of the sites by name, those that begin a stream among them
  const step = Math.ceil(sites.length / most), at = sites.map((_, k) => k).filter(k => k % step === 0);
  return {tickvals: at, ticktext: at.map(k => clipped(sites[k].short, letters))};
}

function clipped(text, letters) {  // its words cut short, as far as that is enough
  for (let left = 12; left > 2 && text.length > letters; left--) text = text.split(".").map(word => word.slice(0, left)).join(".");
  return text.length <= letters ? text : text.slice(0, Math.ceil(letters / 2) - 1) + "…" + text.slice(-Math.floor(letters / 2));
}

function borders(sites, way) {  // a line where another stream of sites begins
  const {soft} = look();
  return sites.flatMap((site, k) => k && site.stream !== sites[k - 1].stream
    ? [{type: "line", line: {color: soft, width: 1, dash: "dot"}, ...(way === "y"
      ? {xref: "paper", x0: 0, x1: 1, y0: k - 0.5, y1: k - 0.5} : {yref: "paper", y0: 0, y1: 1, x0: k - 0.5, x1: k - 0.5})}] : []);
}

function grid(place) {
  const card = cards[place.dataset.grid], run = runs[place.dataset.run], packed = run.grids[card.grid], shown = look();
  const rows = unpack(packed), sites = run.sites;
  // Two runs have the same colours for the same numbers.
  const all = runs.map(one => one.grids[card.grid]).filter(Boolean);
  const lowest = Math.min(...all.map(one => one.low)), highest = Math.max(...all.map(one => one.high));
  // What is less than the largest by more than five digits is next to nothing.
  const [low, high] = packed.log ? [Math.max(lowest, highest - 5), highest] : range(lowest, highest);
  const z = sites.map((_, site) => rows.map(row => row[site]));
  const value = packed.log ? z.map(row => row.map(number => number === null ? null : 10 ** number)) : z;
  const trace = {type: "heatmap", x: run.spans, y: sites.map((_, k) => k), z, customdata: value, zmin: low,
    zmax: high > low ? high : low + 1, text: sites.map(site => run.spans.map(() => escaped(site.name))),
    colorscale: colours(packed.log ? 0 : low), hoverongaps: false,
    hovertemplate: "%{text}<br>step %{x:,d}: %{customdata:.3~g}<extra></extra>",
    colorbar: {thickness: 10, outlinewidth: 0, xpad: 4, tickfont: {color: shown.soft, size: 11}, ...bar(packed.log, low, high)}};
  const height = Math.max(130, Math.min(340, sites.length * 15 + 60));
  return [[trace], layout({height, shapes: borders(sites, "y"),
    ...(two ? {annotations: [{text: escaped(run.name), xref: "paper", yref: "paper", x: 0, y: 1, yanchor: "bottom",
      xanchor: "left", showarrow: false, font: {color: shown["run" + place.dataset.run], size: 12}}]} : {}),
    margin: {...aligned(place), t: two ? 24 : 6, b: 8},
    xaxis: {title: {text: "step", standoff: 4, font: {color: shown.soft, size: 11}}, showgrid: false, range: STEPS},
    yaxis: {autorange: "reversed", showgrid: false, zeroline: false, automargin: false,
      ...ticks(sites, Math.max(4, (height - 60) / 15), room(place) < 480 ? 8 : 16)}})];
}

function bar(log, low, high) {  // values beside the colours, where z are their logarithms
  if (!log || !(high > low)) return {nticks: 5, exponentformat: "power"};
  const whole = [];
  for (let power = Math.ceil(low); power <= high; power += Math.ceil((high - low) / 5)) whole.push(power);
  const at = whole.length > 1 ? whole : [low, (low + high) / 2, high];
  return {tickvals: at, ticktext: at.map(power => short(10 ** power))};
}

// -- matrices at a step -----------------------------------------------------------------------------------------------

function moment(run) {  // of this run, the one nearest to the step that the slider is at
  const step = runs.find(one => one.moments.length).moments[slider.value];
  let best = 0;
  run.moments.forEach((other, k) => { if (Math.abs(other - step) < Math.abs(run.moments[best] - step)) best = k; });
  return best;
}

function bounds(key) {  // of all runs and steps, so that the colours mean the same everywhere
  const all = key === "composite"
    ? runs.flatMap(run => run.composites.flat().filter(Boolean).flatMap(found => found.map.filter(value => value !== null)))
    : runs.filter(run => run.moments.length).flatMap(run => [run.maps[key].low, run.maps[key].high]);
  const low = all.reduce((a, b) => Math.min(a, b), 0), high = all.reduce((a, b) => Math.max(a, b), key === "post" ? 2 : 1);
  return range(low, high);
}

const bound = {};
const heat = (more, key) => {
  const [low, high] = bound[key] = bound[key] || bounds(key);
  return {type: "heatmap", zmin: low, zmax: high, colorscale: colours(low), showscale: false, hoverongaps: false, ...more};
};
const bare = {visible: false, fixedrange: true};

function places(run, key) {  // where each site's numbers begin in a row
  let next = 0;
  return run.sites.map(site => { const at = next; next += key === "res" ? site.n ** 2 : site.n; return at; });
}

function tiles(place) {  // H_res of all sites, each a square, in the order of their calls
  const run = runs[place.dataset.run], most = Math.max(...run.sites.map(site => site.n)), shown = look();
  const row = unpack(run.maps.res)[moment(run)], at = places(run, "res"), width = room(place);
  const labels = run.sites.map((site, k) => run.sites.length <= 48 ? clipped(site.short, 16) : String(k + 1));
  const letters = Math.max(...labels.map(label => label.length));
  let cell, across, gap;
  for (cell = width < 500 ? 16 : 26; cell >= 4; cell--) {
    gap = Math.max(1, Math.ceil((letters * 5.6 + 6 - most * cell) / cell));
    across = Math.max(1, Math.floor(width / ((most + gap) * cell)));
    if (Math.ceil(run.sites.length / across) * (most * cell + 20) <= 760 || most * cell <= 34) break;
  }
  const up = Math.ceil(16 / cell), wide = most + gap, high = most + up, down = Math.ceil(run.sites.length / across);
  const z = Array.from({length: down * high}, () => Array(across * wide).fill(null));
  const text = z.map(line => line.slice());
  run.sites.forEach((site, k) => {
    const left = (k % across) * wide, top = Math.floor(k / across) * high + up;
    for (let out = 0; out < site.n; out++) for (let from = 0; from < site.n; from++) {
      z[top + out][left + from] = row[at[k] + out * site.n + from];
      text[top + out][left + from] = `${escaped(site.name)}<br>to ${out + 1} from ${from + 1}: ${short(row[at[k] + out * site.n + from])}`;
    }
  });
  const names = {type: "scatter", mode: "text", hoverinfo: "skip", textposition: "middle right", text: labels.map(escaped),
    x: run.sites.map((_, k) => (k % across) * wide - 0.5), y: run.sites.map((_, k) => Math.floor(k / across) * high + up - 0.5 - 8 / cell),
    textfont: {size: 10, color: shown.soft}, cliponaxis: false};
  return [[heat({z, text, hovertemplate: "%{text}<extra></extra>"}, "res"), names], layout({
    height: down * high * cell, width: across * wide * cell, margin: {l: 0, r: 0, t: 0, b: 0}, showlegend: false,
    xaxis: {...bare, range: [-0.5, across * wide - 0.5]}, yaxis: {...bare, range: [down * high - 0.5, -0.5]}})];
}

function composite(place) {
  const run = runs[place.dataset.run], found = run.composites[moment(run)] || [], shown = look();
  const size = Math.max(60, Math.min(230, room(place) / Math.max(1, Math.min(found.length, 4)) - 30));
  const there = found.map((one, k) => [one, k]).filter(([one]) => one), across = Math.max(1, Math.floor(room(place) / (size + 30)));
  const down = Math.max(1, Math.ceil(there.length / across)), wide = across * (size + 30), high = down * (size + 26);
  const made = {height: high, width: wide, margin: {l: 0, r: 0, t: 0, b: 0}, annotations: [], showlegend: false};
  const traces = there.map(([one, stream], k) => {
    const [rows, columns] = one.shape, left = (k % across) * (size + 30), top = Math.floor(k / across) * (size + 26) + 20;
    const name = k ? String(k + 1) : "";
    made["xaxis" + name] = {...bare, domain: [left / wide, (left + size) / wide], anchor: "y" + name};
    made["yaxis" + name] = {...bare, domain: [1 - (top + size) / high, 1 - top / high], anchor: "x" + name, autorange: "reversed"};
    if (found.length > 1) made.annotations.push({text: `stream ${stream + 1}`, showarrow: false, xref: "paper",
      yref: "paper", x: left / wide, y: 1 - (top - 20) / high, xanchor: "left", yanchor: "top", font: {size: 11, color: shown.soft}});
    return heat({z: Array.from({length: rows}, (_, out) => one.map.slice(out * columns, (out + 1) * columns)),
      xaxis: "x" + name, yaxis: "y" + name, texttemplate: Math.max(rows, columns) <= 6 ? "%{z:.2f}" : undefined,
      hovertemplate: "to %{y} from %{x}: %{z:.3~g}<extra></extra>", x: [...Array(columns).keys()].map(j => j + 1),
      y: [...Array(rows).keys()].map(i => i + 1), xgap: 1, ygap: 1}, "composite");
  });
  return [traces, layout(made)];
}

function depth(place) {  // H_pre or H_post: streams by sites
  const run = runs[place.dataset.run], key = place.dataset.map, row = unpack(run.maps[key])[moment(run)], at = places(run, key);
  const most = Math.max(...run.sites.map(site => site.n));
  const z = Array.from({length: most}, (_, stream) => run.sites.map((site, k) => stream < site.n ? row[at[k] + stream] : null));
  const text = z.map(line => line.map((value, k) => `${escaped(run.sites[k].name)}: ${short(value)}`));
  const few = run.sites.length <= 60;
  return [[heat({z, text, y: [...Array(most).keys()].map(k => k + 1), xgap: few ? 1 : 0, ygap: 1,
    hovertemplate: "%{text}, stream %{y}<extra></extra>"}, key)], layout({height: 20 * most + 90, margin: {l: 8, r: 8, t: 4, b: 8},
    shapes: borders(run.sites, "x"),
    xaxis: {showgrid: false, tickangle: 0, ...ticks(run.sites, Math.max(2, room(place) / 105))},
    yaxis: {autorange: "reversed", showgrid: false, dtick: most > 8 ? 4 : 1, title: {text: "stream", standoff: 6, font: {color: look().soft, size: 11}}}})];
}

function keys() {  // which colour is which number
  document.querySelectorAll(".key").forEach(key => {
    const [low, high] = bound[key.dataset.key] = bound[key.dataset.key] || bounds(key.dataset.key);
    const bar = colours(low).map(([at, colour]) => `${colour} ${at * 100}%`).join(", ");
    key.innerHTML = `${short(low)} <i style="background: linear-gradient(to right, ${bar})"></i> ${short(high)}`;
  });
}

// -- when what is drawn -----------------------------------------------------------------------------------------------

const all = [...document.querySelectorAll(".plot")], drawn = new Set();
const kinds = {res: tiles, composite, pre: depth, post: depth};

function draw(place) {
  drawn.add(place);
  const run = runs[place.dataset.run];
  if (place.dataset.map && !(run.moments.length && run.sites.length)) {
    place.textContent = `${run.name} holds no matrices.`;
    return;
  }
  const made = place.dataset.lines ? lines(place) : place.dataset.grid ? grid(place) : kinds[place.dataset.map](place);
  if (place.dataset.lines && !made[0].length) {
    place.style.height = "auto";
    place.textContent = "The run holds no loss.";
    return;
  }
  made[1].width = made[1].width || room(place);
  Plotly.react(place, made[0], made[1], CONFIG);
}

function again(some) { some.filter(place => drawn.has(place)).forEach(draw); }

const watch = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
}), {rootMargin: "500px"});

const idle = window.requestIdleCallback || (call => setTimeout(call, 30));
function rest() {
  const next = all.find(place => !drawn.has(place));
  if (next) draw(next);
  if (all.some(place => !drawn.has(place))) idle(rest);
  else document.documentElement.dataset.drawn = "all";
}

if (slider) {
  const leading = runs.find(run => run.moments.length), output = document.getElementById("step");
  const maps = all.filter(place => place.dataset.map);
  slider.max = leading.moments.length - 1;
  slider.value = slider.max;
  const tell = () => {
    output.value = leading.moments[slider.value].toLocaleString("en");
    slider.setAttribute("aria-valuetext", "step " + output.value);
  };
  slider.addEventListener("input", () => { tell(); again(maps); });
  tell();
  keys();
}

all.forEach(place => watch.observe(place));
window.addEventListener("load", () => setTimeout(() => idle(rest), 50));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { keys(); again(all); });
let waiting, width = innerWidth;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; again(all); } }, 120);
});
const print = on => { paper = on; keys(); all.forEach(draw); };
window.addEventListener("beforeprint", () => print(true));
window.addEventListener("afterprint", () => print(false));
