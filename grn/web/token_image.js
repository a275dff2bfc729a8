// A picture made of tokens: samples in rows and columns, of h x w positions each. Positions are painted or picked.
export default {
  template: `
    <div class="token-image" ref="root" tabindex="0" role="img" :aria-label="label" :data-mode="mode"
         :style="{aspectRatio: across + ' / ' + high}"
         @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up" @pointerleave="hover = null"
         @keydown="key">
      <img v-if="source" :src="source" alt="" draggable="false">
      <canvas ref="cells" :width="across" :height="high"></canvas>
      <i v-for="n in columns - 1" class="edge" :style="{left: 100 * n / columns + '%', top: 0, bottom: 0, width: '2px'}"></i>
      <i v-for="n in rows - 1" class="edge" :style="{top: 100 * n / rows + '%', left: 0, right: 0, height: '2px'}"></i>
      <i v-if="box(hover)" class="hover" :style="box(hover)"></i>
      <i v-if="selected !== null && mode === 'inspect'" class="selected" :style="box(selected)"></i>
    </div>`,
  props: {
    source: String, label: String, columns: Number, rows: Number, width: Number, height: Number, mode: String,
    brush: Number, painted: Array, selected: {type: Number, default: null},
  },
  data() { return {hover: null, stroke: null, erasing: true}; },
  computed: {
    across() { return this.columns * this.width; },
    high() { return this.rows * this.height; },
  },
  mounted() { this.show(); },
  updated() { this.show(); },
  watch: {painted() { this.show(); }},
  methods: {
    show() {
      const canvas = this.$refs.cells, draw = canvas.getContext("2d");
      draw.clearRect(0, 0, this.across, this.high);
      draw.fillStyle = "rgba(240, 228, 66, 0.72)";
      const cells = new Set(this.painted || []);
      for (const cell of this.stroke || []) this.erasing ? cells.add(cell) : cells.delete(cell);
      for (const cell of cells) draw.fillRect(cell % this.across, Math.floor(cell / this.across), 1, 1);
    },
    at(event) {
      const box = this.$refs.root.getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / box.width * this.across);
      const y = Math.floor((event.clientY - box.top) / box.height * this.high);
      return x < 0 || y < 0 || x >= this.across || y >= this.high ? null : y * this.across + x;
    },
    box(cell) {
      if (cell === null || cell === undefined) return null;
      const x = cell % this.across, y = Math.floor(cell / this.across);
      const r = this.mode === "erase" && cell === this.hover ? this.brush : 0;
      return {left: 100 * (x - r) / this.across + "%", top: 100 * (y - r) / this.high + "%",
              width: 100 * (1 + 2 * r) / this.across + "%", height: 100 * (1 + 2 * r) / this.high + "%"};
    },
    around(cell) {  // the brush stays within the sample
      const x = cell % this.across, y = Math.floor(cell / this.across), found = [];
      const left = x - x % this.width, top = y - y % this.height;
      for (let j = y - this.brush; j <= y + this.brush; j++)
        for (let i = x - this.brush; i <= x + this.brush; i++)
          if (i >= left && i < left + this.width && j >= top && j < top + this.height) found.push(j * this.across + i);
      return found;
    },
    between(a, b) {  // positions on the way, so that quick strokes have no gaps
      const [x0, y0, x1, y1] = [a % this.across, Math.floor(a / this.across), b % this.across, Math.floor(b / this.across)];
      const count = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1);
      return [...Array(count + 1).keys()].map(
        n => Math.round(y0 + (y1 - y0) * n / count) * this.across + Math.round(x0 + (x1 - x0) * n / count));
    },
    down(event) {
      const cell = this.at(event);
      if (cell === null || event.button) return;
      if (this.mode !== "erase") { this.$emit("pick", {cell}); return; }
      event.preventDefault();
      this.$refs.root.setPointerCapture(event.pointerId);
      this.erasing = !(event.shiftKey || event.altKey);
      this.stroke = new Set(this.around(cell));
      this.last = cell;
      this.show();
    },
    move(event) {
      this.hover = this.at(event);
      if (this.stroke === null || this.hover === null) return;
      for (const cell of this.between(this.last, this.hover)) for (const near of this.around(cell)) this.stroke.add(near);
      this.last = this.hover;
      this.show();
    },
    up() {
      if (this.stroke === null) return;
      this.$emit("stroke", {cells: [...this.stroke], erase: this.erasing});
      this.stroke = null;
    },
    key(event) {
      const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.across, ArrowDown: this.across}[event.key];
      if (!by || this.mode !== "inspect") return;
      event.preventDefault();
      event.stopPropagation();
      const cell = (this.selected === null ? 0 : this.selected) + by;
      if (cell >= 0 && cell < this.across * this.high) this.$emit("pick", {cell});
    },
  },
};
