// The matrix: the ranking of every run by relative depth. Only what is in view is drawn.

const ROW = 16; // height in pixels
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

function openMatrix() {
  if (!data.matrix) return;
  const view = $("matrix-view");
  $("matrix-fit").addEventListener("input", layMatrix);
  view.addEventListener("scroll", () => requestAnimationFrame(drawMatrix));
  view.addEventListener("mousemove", (event) => { $("matrix-at").textContent = matrixText(event); });
  new ResizeObserver(() => requestAnimationFrame(layMatrix)).observe(view);
}

/** The height of a row: small enough for all at once, if that is wanted. */
function rowHeight() {
  return $("matrix-fit").checked ? Math.min(ROW, Math.max(0.25, $("matrix-view").clientHeight / data.matrix.length)) : ROW;
}

function layMatrix() {
  if (!data?.matrix) return;
  $("matrix-space").style.height = `${data.matrix.length * rowHeight()}px`;
  drawMatrix();
}

const labelWidth = (width) => Math.min(width * 0.34, 300);

function drawMatrix() {
  const [view, canvas] = [$("matrix-view"), $("matrix-canvas")];
  const [width, height, ratio] = [view.clientWidth, view.clientHeight, devicePixelRatio || 1];
  if (!width) return;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const [left, row] = [labelWidth(width), rowHeight()];
  const first = Math.floor(view.scrollTop / row);
  const shown = data.matrix.slice(first, Math.ceil((view.scrollTop + height) / row));
  pen.scale(ratio, ratio);
  pen.translate(0, first * row - view.scrollTop);
  shown.forEach(({ places }, index) => {
    const step = (width - left) / places.length;
    places.forEach((share, layer) => {
      pen.fillStyle = share < 0 ? color("line") : rankColors[share];
      pen.fillRect(left + layer * step, index * row, step + 0.4, row - (row >= ROW ? 1 : 0));
    });
  });
  if (row < 11) return;
  pen.beginPath();
  pen.rect(0, 0, left - 8, height + row);
  pen.clip();
  pen.textBaseline = "middle";
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = color("muted");
  shown.forEach(({ label }, index) => pen.fillText(label, 4, (index + 0.5) * row));
}

/** The run below the pointer, and its layer there. */
function matrixText(event) {
  const view = $("matrix-view");
  const box = view.getBoundingClientRect();
  const left = labelWidth(view.clientWidth);
  const across = (event.clientX - box.left - left) / (view.clientWidth - left);
  const run = data.matrix[Math.floor((event.clientY - box.top + view.scrollTop) / rowHeight())];
  if (!run) return "";
  const about = `${run.label} (${run.about})`;
  if (across < 0 || across >= 1) return about;
  const layer = Math.floor(across * run.places.length);
  const share = run.places[layer];
  const place = share < 0 ? "no score" : share === 0 ? "the least important" : share === 100 ? "the most important" : `less important than ${100 - share}% of the others`;
  return `${about}: layer ${layer} of ${run.places.length}, ${place}.`;
}

