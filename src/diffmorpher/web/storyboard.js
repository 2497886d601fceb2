// Of one picture of the storyboard. The picture, or its grip, is dragged onto another's place; the frame of its crop is dragged,
// or moved with the arrow keys, along the side of which something is cut off.
element.addEventListener('dragstart', (event) => {
  event.dataTransfer.setData('text/x-picture', element.closest('[id^=thumb-]').id.split('-')[1]);
  event.dataTransfer.effectAllowed = 'move';
});
element.addEventListener('dragover', (event) => {
  if (event.dataTransfer.types.includes('text/x-picture')) event.preventDefault();
});
element.addEventListener('drop', (event) => {
  const moved = event.dataTransfer.getData('text/x-picture');
  if (moved) { event.preventDefault(); event.stopPropagation(); trigger('pick', {moved: Number(moved)}); }
});

// left, top: of the frame, in shares of the picture, as are the frame's own sides.
const place = (frame, left, top) => {
  const width = Number(frame.dataset.width), height = Number(frame.dataset.height);
  left = Math.min(Math.max(left, 0), 1 - width);
  top = Math.min(Math.max(top, 0), 1 - height);
  frame.style.left = `${100 * left}%`;
  frame.style.top = `${100 * top}%`;
  const middle = [left + width / 2, top + height / 2];
  frame.dataset.focus = middle.map((share) => share.toFixed(2)).join(',');
  frame.setAttribute('aria-valuenow', Math.round(100 * middle[width < 1 ? 0 : 1]));
};
const corner = (frame) => [parseFloat(frame.style.left) / 100, parseFloat(frame.style.top) / 100];
const tell = (frame) => trigger('pick', {focus: frame.dataset.focus});

let held = null;
element.addEventListener('pointerdown', (event) => {
  const frame = event.target.closest('.crop');
  if (!frame) return;
  event.preventDefault();
  frame.focus();
  frame.setPointerCapture(event.pointerId);
  held = {frame, from: [event.clientX, event.clientY], corner: corner(frame)};
});
element.addEventListener('pointermove', (event) => {
  if (!held) return;
  const picture = held.frame.parentElement;
  place(held.frame,
    held.corner[0] + (event.clientX - held.from[0]) / picture.clientWidth,
    held.corner[1] + (event.clientY - held.from[1]) / picture.clientHeight);
});
for (const end of ['pointerup', 'pointercancel']) element.addEventListener(end, () => {
  if (held) tell(held.frame);
  held = null;
});
element.addEventListener('keydown', (event) => {
  const step = {ArrowLeft: -0.05, ArrowUp: -0.05, ArrowRight: 0.05, ArrowDown: 0.05}[event.key];
  const frame = event.target.closest('.crop');
  if (!frame || !step) return;
  event.preventDefault();
  const [left, top] = corner(frame);
  place(frame, left + step, top + step);  // it can move along one side alone
  tell(frame);
});
