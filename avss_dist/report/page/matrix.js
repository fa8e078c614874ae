// The matrix: the ranking of every run by relative depth, grouped and searched. Only what is in view is drawn.

const ROW = 16; // heights in pixels
const HEADING = 28;
const BINS = 60; // of the mean ranking of a group
const MATRIX_FILTERS = ["find", "group", "score", "fit"];
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const rankColors = Array.from({ length: 101 }, (_, share) => {
  const at = (share / 100) * (VIRIDIS.length - 1);
  const [low, high] = [VIRIDIS[Math.floor(at)], VIRIDIS[Math.ceil(at)]];
  const mixed = [0, 2, 4].map((i) => {
    const [a, b] = [low, high].map((color) => parseInt(color.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * (at % 1));
  });
  return `rgb(${mixed.join(" ")})`;
});
let matrixLines = []; // headings and runs from top to bottom, with the place and the height of each

const matrixControl = (name) => $(`matrix-${name}`);
const matrixRanks = () => data.matrix.ranks[matrixControl("score").value];

function addOptions(select, values, title) {
  select.append(...values.map((value) => Object.assign(document.createElement("option"), { value, textContent: title(value) })));
}

function openMatrix() {
  if (!data.matrix) return;
  const { runs, ranks, titles, groups } = data.matrix;
  addOptions(matrixControl("group"), Object.keys(groups), (name) => groups[name]);
  addOptions(matrixControl("score"), Object.keys(ranks), (name) => titles[name]);
  for (const run of runs) run.text = Object.values(run).join(" ").toLowerCase();
  readAddress();
  $("matrix-filters").addEventListener("submit", (event) => event.preventDefault());
  $("matrix-filters").addEventListener("input", () => {
    layMatrix();
    writeAddress();
  });
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#matrix?")) readAddress();
    else writeAddress(location.hash);
    layMatrix();
  });
  const view = $("matrix-view");
  view.addEventListener("scroll", () => requestAnimationFrame(drawMatrix));
  view.addEventListener("mousemove", (event) => { $("matrix-at").textContent = matrixText(event); });
  view.addEventListener("click", chooseRun);
  new ResizeObserver(() => requestAnimationFrame(layMatrix)).observe(view);
}

/** Put the filters in the address, behind the part of the page that it names. */
function writeAddress(section = "#matrix") {
  const filters = new URLSearchParams();
  for (const name of MATRIX_FILTERS) {
    const { type, checked, value, options } = matrixControl(name);
    const given = type === "checkbox" ? (checked ? "1" : "") : value;
    if (given && given !== options?.[0].value) filters.set(name, given);
  }
  const text = String(filters);
  history.replaceState(null, "", text ? `${section.split("?")[0]}?${text}` : section.split("?")[0]);
}

/** Set the filters to those in the address; names that the page does not know are left out. */
function readAddress() {
  const [section, text] = location.hash.split("?");
  const filters = new URLSearchParams(text ?? "");
  for (const name of MATRIX_FILTERS) {
    const control = matrixControl(name);
    if (control.type === "checkbox") control.checked = filters.get(name) === "1";
    else if (control.options) control.selectedIndex = Math.max(0, [...control.options].findIndex(({ value }) => value === filters.get(name)));
    else control.value = filters.get(name) ?? "";
  }
  if (text !== undefined) document.getElementById(section.slice(1))?.scrollIntoView();
}

/** The runs that all words of the search are in, by group, in the order of the groups' names. */
function matrixGroups() {
  const words = matrixControl("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const by = matrixControl("group").value;
  const groups = new Map();
  data.matrix.runs.forEach((run, index) => {
    if (!matrixRanks()[index].length || !words.every((word) => run.text.includes(word))) return;
    const key = by ? String(run[by]) : "";
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(index);
  });
  return [...groups].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
}

function layMatrix() {
  if (!data?.matrix) return;
  const view = $("matrix-view");
  const groups = matrixGroups();
  const shown = groups.reduce((sum, [, members]) => sum + members.length, 0);
  const headings = matrixControl("group").value ? groups.length * HEADING : 0;
  const fitting = Math.max(0.25, (view.clientHeight - headings) / Math.max(1, shown));
  const height = matrixControl("fit").checked ? Math.min(ROW, fitting) : ROW;
  let top = 0;
  matrixLines = [];
  const add = (line, size) => {
    matrixLines.push({ ...line, top, height: size });
    top += size;
  };
  for (const [heading, members] of groups) {
    if (headings) add({ heading, members }, HEADING);
    for (const run of members) add({ run }, height);
  }
  $("matrix-space").style.height = `${top}px`;
  const number = (value) => value.toLocaleString("en");
  const inGroups = headings ? ` in ${number(groups.length)} group${groups.length === 1 ? "" : "s"}` : "";
  $("matrix-said").textContent = `${number(shown)} of ${number(data.matrix.runs.length)} runs${inGroups}.`;
  drawMatrix();
}

/** The place of the first line that ends below a height. */
function lineAt(height) {
  let [low, high] = [0, matrixLines.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (matrixLines[middle].top + matrixLines[middle].height <= height) low = middle + 1;
    else high = middle;
  }
  return low;
}

const labelWidth = (width) => Math.min(width * 0.34, 300);

/** The mean place, over the runs of a group, at equal steps of relative depth; -1 where no run has a score. */
function meanRanks(members) {
  const ranks = matrixRanks();
  return Array.from({ length: BINS }, (_, bin) => {
    let [sum, number] = [0, 0];
    for (const run of members) {
      const share = ranks[run][Math.floor(((bin + 0.5) / BINS) * ranks[run].length)];
      if (share >= 0) [sum, number] = [sum + share, number + 1];
    }
    return number ? Math.round(sum / number) : -1;
  });
}

function drawMatrix() {
  const [view, canvas] = [$("matrix-view"), $("matrix-canvas")];
  const [width, height, ratio] = [view.clientWidth, view.clientHeight, devicePixelRatio || 1];
  if (!width) return;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const left = labelWidth(width);
  const ranks = matrixRanks();
  const labels = [];
  pen.scale(ratio, ratio);
  pen.translate(0, -view.scrollTop);
  for (let i = lineAt(view.scrollTop); i < matrixLines.length && matrixLines[i].top < view.scrollTop + height; i++) {
    const line = matrixLines[i];
    const places = line.members ? (line.means ??= meanRanks(line.members)) : ranks[line.run];
    const step = (width - left) / places.length;
    const inset = line.members ? 8 : 0;
    places.forEach((share, layer) => {
      pen.fillStyle = share < 0 ? color("line") : rankColors[share];
      pen.fillRect(left + layer * step, line.top + inset, step + 0.4, line.height - inset - (line.height >= ROW ? 1 : 0));
    });
    if (line.height >= 11) labels.push(line);
  }
  pen.beginPath();
  pen.rect(0, view.scrollTop, left - 8, height);
  pen.clip();
  pen.textBaseline = "middle";
  const font = getComputedStyle(document.body).fontFamily;
  for (const line of labels) {
    pen.font = `${line.members ? "600 13px" : "12px"} ${font}`;
    pen.fillStyle = color(line.members ? "ink" : "muted");
    const text = line.members ? `${line.heading} (${line.members.length})` : data.matrix.runs[line.run].label;
    pen.fillText(text, 4, line.top + line.height / 2 + (line.members ? 3 : 0));
  }
}

/** The line and the place in it, from 0 to 1, below the pointer. */
function matrixPoint(event) {
  const view = $("matrix-view");
  const box = view.getBoundingClientRect();
  const left = labelWidth(view.clientWidth);
  const across = (event.clientX - box.left - left) / (view.clientWidth - left);
  return [matrixLines[lineAt(event.clientY - box.top + view.scrollTop)], across];
}

function matrixText(event) {
  const [line, across] = matrixPoint(event);
  if (!line) return "";
  if (line.members) return `${line.heading}: the mean of ${line.members.length} runs.`;
  const { label, family, corpus, dtype } = data.matrix.runs[line.run];
  const about = `${label} (${[family, dtype, corpus].join(", ")})`;
  const places = matrixRanks()[line.run];
  if (across < 0 || across >= 1) return about;
  const layer = Math.floor(across * places.length);
  const share = places[layer];
  const place = share < 0 ? "no score" : share === 0 ? "the least important" : share === 100 ? "the most important" : `less important than ${100 - share}% of the others`;
  return `${about}: layer ${layer} of ${places.length}, ${place}.`;
}

/** Show the run below the pointer in the charts, if it is among those that are drawn. */
function chooseRun(event) {
  const [line] = matrixPoint(event);
  if (!line || line.members) return;
  const { drawn, id, label } = data.matrix.runs[line.run];
  if (drawn === null) {
    $("matrix-at").textContent = `${label} has no charts on this page: avss report --run '${id}' draws them.`;
    return;
  }
  $("run").value = String(drawn);
  $("run").dispatchEvent(new Event("input", { bubbles: true }));
  $("matrix-at").textContent = `The charts below show ${label}.`;
}

