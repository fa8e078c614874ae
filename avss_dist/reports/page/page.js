const $ = (id) => document.getElementById(id);
const root = document.documentElement;

// Colors.

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function remembered() {
  try { return localStorage.getItem("avss-theme"); } catch { return null; }
}

function setTheme(name) {
  root.dataset.theme = name;
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
  refresh();
}

$("theme").addEventListener("click", () => {
  const name = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("avss-theme", name); } catch { /* a page without storage forgets */ }
  setTheme(name);
});
prefersDark.addEventListener("change", () => remembered() || setTheme(prefersDark.matches ? "dark" : "light"));

/** The configuration of the charts, in the colors of the page. */
function chartConfig() {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const font = getComputedStyle(document.body).fontFamily;
  const text = { labelColor: color("muted"), titleColor: color("ink"), labelFont: font, titleFont: font, titleFontWeight: 500 };
  return {
    background: color("surface"),
    font,
    axis: { ...text, gridColor: color("line"), domainColor: color("line"), tickColor: color("line"), labelFontSize: 11, titleFontSize: 12 },
    axisY: { minExtent: 40 },
    legend: { ...text, labelLimit: 320, symbolStrokeWidth: 2, labelFontSize: 12 },
    title: { color: color("muted"), font, fontSize: 12, fontWeight: 400, offset: 6 },
    view: { stroke: null },
    range: { category: [color("accent"), color("second")], diverging: [color("reverse"), color("middle"), color("accent")] },
    style: {
      weak: { color: color("ink") },
      strong: { color: color("surface") },
    },
  };
}

// Tables: sorted by the button in a column's heading, missing values always last.

function sortTable(table, column, descending) {
  const headings = [...table.tHead.rows[0].cells];
  const numeric = headings[column].classList.contains("number");
  const key = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    const order = numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b), "en", { numeric: true });
    return descending ? -order : order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  headings.forEach((heading, i) => {
    if (i === column) heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("button")?.parentElement;
    if (heading) sortTable(table, heading.cellIndex, heading.getAttribute("aria-sort") === "ascending");
  });
}

// Downloads.

function download(name, url) {
  const link = document.createElement("a");
  link.download = name;
  link.href = url;
  link.click();
  if (url.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A value of a CSV file; text that a spreadsheet would take for a formula is quoted for it. */
function csvValue(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function saveCsv(name, columns, rows) {
  const lines = [columns, ...rows].map((row) => row.map(csvValue).join(","));
  download(`${name}.csv`, URL.createObjectURL(new Blob([lines.join("\r\n"), "\r\n"], { type: "text/csv" })));
}

for (const button of document.querySelectorAll("[data-csv]")) {
  button.addEventListener("click", () => {
    const table = document.querySelector(`table[data-name="${button.dataset.csv}"]`);
    const cells = (row, value) => [...row.cells].map(value);
    saveCsv(button.dataset.csv, cells(table.tHead.rows[0], (c) => c.textContent.trim()),
      [...table.tBodies[0].rows].map((row) => cells(row, (c) => c.dataset.export ?? c.dataset.value)));
  });
}

// The data: see page_data.py.

const CHOSEN = ["site", "recipe", "threshold"];
const CSV = {
  heat: ["run", "score", "layer", "layer_name", "from", "to", "value", "rank", "share", "lowest"],
  lowest: ["score", "place", "from", "to", "share", "chance"],
  correlation: ["run", "other", "score", "kind", "correlation"],
  blocks: ["run", "start", "length", "distance"],
  kept: ["run", "series", "dropped", "size", "share", "kept"],
};
let data = null;
let scoreNames = []; // AVSS first
let scoreTitles = {};
let blockOf = new Map();

async function readData() {
  const bytes = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  data = await new Response(stream).json();
  scoreNames = data.scores.map(({ name }) => name);
  scoreTitles = Object.fromEntries(data.scores.map(({ name, title }) => [name, title]));
  for (const name of scoreNames) {
    const interval = name === "avss" ? ["low", "high", "chance", "quality"] : [];
    CSV[name] = ["run", "layer", "layer_name", "depth", name, ...interval, "rank", "lowest"];
  }
  blockOf = new Map(data.blocks.map((block) => [`${block[0]}:${block[1]}`, block]));
}

/** Layers of a run at a choice; without scores there, none. */
function rowsOf(run, choice, which = 0) {
  const block = blockOf.get(`${run}:${choice}`);
  if (!block) return [];
  const [, , start, end, lowest] = block;
  const { label, layer_name, ...about } = data.runs[run];
  const rows = [];
  for (let i = start; i < end; i++) {
    const row = { run: label, which };
    for (const [name, column] of Object.entries(data.columns)) row[name] = column[i];
    row.layer_name = layer_name[row.layer];
    row.depth = (row.layer + 0.5) / layer_name.length;
    if (row.low !== null) [row.low, row.high] = [Math.min(row.low, row.avss), Math.max(row.high, row.avss)]; // rounded
    row.sparsity = row.near_zero === null ? null : row.near_zero / row.count;
    row.lowest = row.rank !== null && row.rank <= lowest;
    for (const name of scoreNames) if (name in about) row[name] = about[name][row.layer];
    rows.push(row);
  }
  return rows;
}

// What is chosen.

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
const run = () => Number($("run").value);
const other = () => ($("other").value === "" || $("other").value === $("run").value ? null : Number($("other").value));
const unique = (name, choices) => [...new Set(choices.map((choice) => choice[name]))];

/** Positions of the choices of a site and recipe, by threshold. */
function choicesOf(site, recipe) {
  return data.choices.flatMap((choice, i) => (choice.site === site && choice.recipe === recipe ? [i] : []));
}

const choice = () => choicesOf(chosen("site"), chosen("recipe"))[$("threshold").valueAsNumber];
const described = ({ site, recipe, threshold }) => `${site} site, ${recipe} recipe, |x| < ${threshold}`;

function addRadios(name, values, value, titles = {}) {
  for (const each of values) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value: each, checked: each === value });
    label.append(input, Object.assign(document.createElement("span"), { textContent: titles[each] ?? each }));
    $(name).append(label);
  }
}

/** Offer the recipes of the site and the thresholds of both; the threshold stays if it is there. */
function offer(threshold) {
  const recipes = unique("recipe", data.choices.filter((c) => c.site === chosen("site")));
  for (const input of document.querySelectorAll('input[name="recipe"]')) input.disabled = !recipes.includes(input.value);
  if (!recipes.includes(chosen("recipe"))) document.querySelector(`input[name="recipe"][value="${recipes[0]}"]`).checked = true;
  const thresholds = choicesOf(chosen("site"), chosen("recipe")).map((i) => data.choices[i].threshold);
  const slider = $("threshold");
  slider.max = String(thresholds.length - 1);
  slider.value = String(Math.max(0, thresholds.indexOf(threshold)));
  slider.dataset.value = thresholds[slider.valueAsNumber];
}

function tell() {
  const threshold = data.choices[choice()].threshold;
  $("threshold").dataset.value = threshold;
  $("threshold").setAttribute("aria-valuetext", `below ${threshold}`);
  $("threshold-text").textContent = `|x| < ${threshold}`;
  const scored = data.runs.filter((_, i) => blockOf.has(`${i}:${choice()}`)).length;
  $("status").textContent = `${described(data.choices[choice()])}: scored in ${scored} of ${data.runs.length} runs.`;
}

// Charts.

const MANY = 2000; // marks, above which a canvas is quicker than elements
const figures = Object.fromEntries([...document.querySelectorAll("[data-chart]")].map((f) => [f.dataset.chart, f]));

/** Draw rows: into the view that is there, if the specification and the colors are the same. */
async function draw(name, variant, rows, given, said, nothing = "Nothing to draw: not measured at this choice.") {
  const figure = figures[name];
  const place = figure.querySelector(".view");
  const signals = { choice: given.choice ?? described(data.choices[choice()]), limit: figure.clientWidth - 90, ...given };
  const title = figure.querySelector("h3, h4").textContent;
  const text = rows.length ? said : nothing;
  figure.rows = rows;
  figure.querySelector(".said").textContent = text;
  for (const button of figure.querySelectorAll("[data-save]")) button.disabled = rows.length === 0;
  const numbers = figure.dataset.alone === undefined ? "The table of scores has the numbers." : "The CSV file has the numbers.";
  const label = `${title}, ${signals.choice}. ${text} ${numbers}`;
  place.setAttribute("aria-label", label);
  place.hidden = rows.length === 0;
  if (!rows.length) return;
  const lines = new Set(rows.map((row) => row.run)).size;
  const height = figure.dataset.rows === undefined ? undefined : lines * (lines > 20 ? 15 : 22);
  const key = `${variant} ${height} ${root.dataset.theme} ${rows.length > MANY}`;
  const copies = rows.map((row) => ({ ...row })); // the library marks what it draws
  if (figure.key !== key) {
    figure.view?.finalize();
    const spec = { ...(data.pictures[variant]?.spec ?? data.charts[variant]), datasets: { rows: copies } };
    if (height) spec.height = height;
    spec.params = spec.params.map((param) => (param.name in signals ? { ...param, value: signals[param.name] } : param));
    const tooltip = { disableDefaultStyle: true };
    const renderer = rows.length > MANY ? "canvas" : "svg";
    const made = await vegaEmbed(place, spec, { ast: true, actions: false, renderer, defaultStyle: false, tooltip, config: chartConfig() });
    place.setAttribute("aria-label", label); // the library has put its own there
    place.querySelector("svg, canvas").setAttribute("aria-hidden", "true"); // the place is one image, the table its text
    figure.view = made.view;
    figure.key = key;
    return;
  }
  for (const [signal, value] of Object.entries(signals)) figure.view.signal(signal, value);
  await figure.view.data("rows", copies).resize().runAsync();
}

function number(value) {
  return value === null || value === undefined ? "" : String(Number(value.toPrecision(4)));
}

function extremes(rows, name) {
  const sorted = rows.filter((row) => row[name] !== null).sort((a, b) => a[name] - b[name]);
  if (!sorted.length) return "";
  const [low, high] = [sorted[0], sorted.at(-1)];
  return `Lowest in layer ${low.layer} (${number(low[name])}), highest in layer ${high.layer} (${number(high[name])}).`;
}

/** Rows of one run with their ranks by another score (null without it), as many of them marked as AVSS marks. */
function ownLowest(rows, name) {
  const sorted = rows.filter((row) => row[name] !== null).sort((a, b) => a[name] - b[name]);
  const rank = new Map(sorted.map((row, i) => [row, i + 1]));
  const number = rows.filter((row) => row.lowest).length;
  return rows.map((row) => ({ ...row, rank: rank.get(row) ?? null, lowest: rank.has(row) && rank.get(row) <= number }));
}

function lowestOf(rows) {
  const lowest = rows.filter((row) => row.lowest).map((row) => row.layer);
  return lowest.length ? `Lowest 25%: layer${lowest.length === 1 ? "" : "s"} ${lowest.join(", ")}. ` : "";
}

function saidOfAvss(rows) {
  const noisy = rows.filter((row) => row.quality !== "ok").length;
  const noise = noisy ? ` ${noisy} of ${rows.length} layers have fewer than 100 near-zero activations: their sparsity is noise.` : "";
  const ranked = rows.filter((row) => row.rank !== null); // others have NaN or infinite activations
  return `${lowestOf(rows) || "No layer has a score. "}${extremes(ranked, "avss")}${noise}`;
}

async function drawByDepth() {
  const shown = rowsOf(run(), choice());
  const beside = other() === null ? [] : rowsOf(other(), choice(), 1);
  const [a, b] = [run(), other() ?? run()].map((i) => data.runs[i].layer_name.length);
  const axis = a === b ? "layer" : "depth";
  const names = [data.runs[run()].label, other() === null ? "" : data.runs[other()].label];
  const signals = { names, which: beside.length ? [0, 1] : [0] };
  for (const name of scoreNames) {
    const mine = name === "avss" ? shown : ownLowest(shown, name);
    const theirs = name === "avss" ? beside : ownLowest(beside, name);
    const scored = [mine, theirs].filter((layers) => layers.some((row) => row[name] !== null));
    const rows = scored.flat(); // a layer without a score is a gap in its line
    const columns = name === "avss" ? ["avss", "low"] : [name];
    const scale = rows.every((row) => columns.every((c) => row[c] === null || row[c] > 0)) ? "log" : "linear";
    const said = name === "avss" ? saidOfAvss(shown) : `${lowestOf(mine)}${extremes(mine, name)}`;
    const interval = name === "avss" && rows.some((row) => row.low !== null) ? ":interval" : "";
    await draw(name, `${name}:${axis}:${scale}${interval}`, rows, signals, said);
  }
}

const narrow = () => document.body.clientWidth < 600;

const across = () => chosen("score");
const named = () => (across() === "avss" ? described(data.choices[choice()]) : `${scoreTitles[across()]}, the same for every site, recipe and threshold`);
const signalsAcross = () => ({ choice: named() });
const room = () => (narrow() ? 96 : Math.min(360, document.body.clientWidth * 0.28)); // for labels of rows, in pixels
const signalsOfRows = () => ({ ...signalsAcross(), room: room() });
const agreementAcross = () => (across() === "avss" ? data.correlations[choice()] : data.rivals[across()]);

/** By run, its layers with the score that is chosen for all runs: value, rank and place. */
function scoredAcross(every) {
  const name = across();
  return every.map((layers, i) => {
    const size = data.runs[i].layer_name.length;
    const rows = (name === "avss" ? layers : ownLowest(layers, name)).filter((row) => row.rank !== null);
    return rows.map((row) => ({
      ...row, score: name, value: row[name], from: row.layer / size, to: (row.layer + 1) / size,
      share: rows.length > 1 ? (row.rank - 1) / (rows.length - 1) : 0.5,
    }));
  });
}

async function drawHeat(scored) {
  const there = scored.filter((layers) => layers.length).length;
  await draw("heat", "heat", scored.flat(), signalsOfRows(), `${there} of ${data.runs.length} runs have scores at this choice.`);
}

const depths = (from, to) => `depth ${from.toFixed(2)} to ${to.toFixed(2)}`;

/** Of every place, the share of runs that have it in their lowest 25%: a place is a layer of the shallowest model. */
async function drawLowest(scored) {
  const there = scored.filter((layers) => layers.length);
  const sizes = there.map((layers) => layers.length);
  const number = Math.min(...sizes);
  const alike = sizes.every((size) => size === number);
  const overlap = (row, place) => Math.max(0, Math.min(row.to, (place + 1) / number) - Math.max(row.from, place / number)) * number;
  const rows = there.length < 2 ? [] : Array.from({ length: number }, (_, place) => {
    const shares = there.map((layers) => layers.reduce((sum, row) => sum + (row.lowest ? overlap(row, place) : 0), 0));
    const chance = there.reduce((sum, layers) => sum + layers.filter((row) => row.lowest).length / layers.length, 0) / there.length;
    return {
      score: across(), place: alike ? `layer ${there[0][place].layer}` : depths(place / number, (place + 1) / number),
      from: place / number, to: (place + 1) / number, share: shares.reduce((a, b) => a + b) / there.length, chance,
    };
  });
  const always = rows.filter((row) => row.share > 0.999);
  const spans = [];
  for (const { from, to } of always) {
    if (spans.length && from - spans.at(-1).to < 1e-9) spans.at(-1).to = to;
    else spans.push({ from, to });
  }
  const places = alike ? always.map((row) => row.place) : spans.map(({ from, to }) => depths(from, to));
  const said = always.length ? `Lowest in every run: ${places.join(", ")}.` : "No place is among the lowest in every run.";
  await draw("lowest", "lowest", rows, signalsAcross(), said, "It takes two runs.");
}

async function drawCorrelation() {
  const { pairs, summary } = agreementAcross();
  const there = [...new Set(pairs.flatMap(([i, j]) => [i, j]))].sort((a, b) => a - b);
  const of = new Map(pairs.map(([i, j, rho, given]) => [`${i}:${j}`, { rho, given }]));
  const cell = (i, j) => {
    if (i === j) return { kind: "with the order of its layers", correlation: of.get(`${i}:${i}`)?.rho ?? null };
    const found = of.get(`${Math.min(i, j)}:${Math.max(i, j)}`);
    return i > j ? { kind: "with each other", correlation: found?.rho ?? null } : { kind: "given depth", correlation: found?.given ?? null };
  };
  const written = there.length <= 14 && !narrow();
  const rows = there.length < 2 ? [] : there.flatMap((i) => there.map((j) => ({
    run: data.runs[i].label, other: data.runs[j].label, column: String(j + 1), score: across(), ...cell(i, j), written,
  })));
  await draw("correlation", "correlation", rows, signalsOfRows(), summary, "It takes two runs with scores of three layers.");
}

/** What is known of the run without some of its layers, whatever is chosen of AVSS. */
async function drawWithout() {
  const label = data.runs[run()].label;
  const { blocks, kept } = data.without[run()];
  if (figures.blocks) {
    const nearest = new Map();
    for (const block of blocks) if (!(nearest.get(block.length)?.distance <= block.distance)) nearest.set(block.length, block);
    const rows = blocks.map((block) => ({ run: label, ...block, nearest: nearest.get(block.length) === block }));
    const few = [...nearest.values()].filter((block) => block.length <= 3);
    const said = few.map(({ start, length, distance }) => `Nearest of ${length}: from layer ${start} (${number(distance)}).`);
    const how = data.runs[run()].has_head ? "avss ablate --damage does it." : "its model predicts no next token.";
    await draw("blocks", "blocks", rows, { choice: label }, said.join(" "), `Not measured of this run: ${how}`);
  }
  if (figures.kept) {
    const rows = kept.map((one) => ({ run: label, ...one }));
    const most = rows.filter((row) => row.kept >= 0.9).sort((a, b) => a.share - b.share).at(-1);
    const percent = (value) => `${(100 * value).toFixed(1)}%`;
    const said = most ? `90% is kept up to ${percent(most.share)} of the layers (${most.series}).` : "Nothing keeps 90%.";
    await draw("kept", "kept", rows, { choice: label }, said, "Nothing was left out and evaluated.");
  }
}

/** The charts of sections, which nothing that is chosen changes: one after the other, again in other colors or widths. */
let pictured = Promise.resolve();

function drawPictures() {
  pictured = pictured.then(async () => {
    for (const [name, { rows, label, meaning }] of Object.entries(data.pictures)) {
      const look = `${root.dataset.theme} ${narrow()}`;
      if (figures[name].look === look) continue;
      const width = narrow() ? room() : Math.min(room(), figures[name].clientWidth * 0.45);
      await draw(name, name, rows, { choice: label, room: width }, meaning);
      figures[name].look = look;
    }
  });
}

for (const figure of Object.values(figures)) {
  figure.addEventListener("click", async (event) => {
    const kind = event.target.closest("[data-save]")?.dataset.save;
    const name = figure.dataset.chart;
    if (kind === "csv") {
      const reading = figure.dataset.alone === undefined ? CHOSEN : [];
      const chosenNow = reading.map((c) => data.choices[choice()][c]);
      const columns = CSV[name] ?? Object.keys(figure.rows[0]);
      saveCsv(name, [...reading, ...columns], figure.rows.map((row) => [...chosenNow, ...columns.map((c) => row[c])]));
    } else if (kind) download(`${name}.${kind}`, await figure.view.toImageURL(kind, 2));
  });
}

// The table of scores.

const tableColumns = () => [
  ["layer", "layer"], [scoreTitles.avss, "avss"], ["low", "low"], ["high", "high"], ["rank", "rank"], ["lowest 25%", "chance"],
  ["variance", "variance"], ["sparsity", "sparsity"], ["near zero", "near_zero"],
  ...scoreNames.filter((name) => name !== "avss").map((name) => [scoreTitles[name], name]),
  ["quality", "quality"], ["name", "layer_name"],
];

function fillTable(rows, several) {
  const table = $("table");
  const sorted = [...table.tHead.rows[0].cells].findIndex((cell) => cell.hasAttribute("aria-sort"));
  const kept = sorted < 0 ? null : table.tHead.rows[0].cells[sorted];
  const [title, descending] = [kept?.textContent, kept?.getAttribute("aria-sort") === "descending"];
  const columns = several ? [["run", "run"], ...tableColumns()] : tableColumns();
  const textual = new Set(["run", "quality", "layer_name"]);
  table.caption.firstChild.textContent = `${several ? "Both runs" : data.runs[run()].label}: ${described(data.choices[choice()])}. `
    + "low and high bound the 95% interval, from eight shards and five elements near zero on; lowest 25% is how often a layer is in that set when shards are resampled.";
  table.tHead.rows[0].replaceChildren(...columns.map(([heading, name]) => {
    const cell = Object.assign(document.createElement("th"), { scope: "col", className: textual.has(name) ? "" : "number" });
    cell.append(Object.assign(document.createElement("button"), { type: "button", textContent: heading }));
    return cell;
  }));
  table.tBodies[0].replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.className = row.lowest ? "lowest" : "";
    line.append(...columns.map(([, name]) => {
      const cell = document.createElement(name === "layer" ? "th" : "td");
      if (name === "layer") cell.scope = "row";
      const value = row[name] ?? "";
      cell.dataset.value = value;
      cell.className = textual.has(name) ? "" : "number";
      const mark = name === "layer" && row.lowest ? " ▼" : "";
      const text = typeof value === "number" && name !== "layer" && name !== "rank" ? number(value) : String(value);
      cell.append(Object.assign(document.createElement("span"), { textContent: text + mark, title: text }));
      return cell;
    }));
    return line;
  }));
  const column = columns.findIndex(([heading]) => heading === title);
  if (column >= 0) sortTable(table, column, descending);
}

// Everything that is chosen drives everything that is drawn; a change while drawing draws once more.

let drawing = false;
let again = false;

async function refresh() {
  if (!data) return;
  layMatrix();
  if (!data.choices.length) {
    drawPictures();
    return;
  }
  tell();
  again = true;
  if (drawing) return;
  drawing = true;
  root.dataset.drawing = "";
  try {
    while (again) {
      again = false;
      const every = data.runs.map((_, i) => rowsOf(i, choice()));
      const beside = other() === null ? [] : rowsOf(other(), choice(), 1);
      fillTable([...every[run()], ...beside], beside.length > 0);
      await drawByDepth();
      const scored = scoredAcross(every);
      await drawHeat(scored);
      if (figures.lowest) await drawLowest(scored);
      await drawCorrelation();
      await drawWithout();
    }
    drawPictures();
  } finally {
    drawing = false;
    delete root.dataset.drawing;
  }
}

async function start() {
  setTheme(remembered() ?? (prefersDark.matches ? "dark" : "light"));
  if (!$("data")) return;
  try {
    await readData();
  } catch (error) {
    $("trouble").textContent = `The charts cannot be drawn: ${error.message}. A browser of 2023 or later can read them.`;
    $("trouble").hidden = false;
    return;
  }
  let width = narrow();
  addEventListener("resize", () => {
    if (width !== narrow()) refresh();
    width = narrow();
  });
  openMatrix();
  if (data.choices.length) offerChoices();
  await refresh();
}

function offerChoices() {
  const first = data.choices[data.first];
  addRadios("site", unique("site", data.choices), first.site);
  addRadios("recipe", unique("recipe", data.choices), first.recipe);
  addRadios("score", scoreNames, "avss", scoreTitles);
  offer(first.threshold);
  $("score").addEventListener("input", refresh);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("input", (event) => {
    if (event.target.type === "radio") offer($("threshold").dataset.value);
    refresh();
  });
}

start();
