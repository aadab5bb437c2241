// Binary answers: the length of the header, a header in JSON, and the arrays that it describes.

/** The values of half-precision numbers, by their bits. */
const HALF = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
	const sign = bits >> 15 ? -1 : 1;
	const exponent = (bits >> 10) & 31;
	const fraction = bits & 1023;
	if (exponent === 0) HALF[bits] = sign * fraction * 2 ** -24;
	else if (exponent === 31) HALF[bits] = fraction ? NaN : sign * Infinity;
	else HALF[bits] = sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

/** An array of numbers with a shape, in C order. */
export class Tensor {
	/** @param {ArrayLike<number>} data @param {number[]} shape */
	constructor(data, shape) {
		this.data = data;
		this.shape = shape;
	}

	/** The number at these indices. @param {number[]} indices */
	at(...indices) {
		let place = 0;
		for (let i = 0; i < this.shape.length; i++) place = place * this.shape[i] + indices[i];
		return this.data[place];
	}

	/** The numbers of a row: the array at these first indices. @param {number[]} indices */
	row(...indices) {
		const size = this.shape.slice(indices.length).reduce((a, b) => a * b, 1);
		let place = 0;
		for (let i = 0; i < indices.length; i++) place = place * this.shape[i] + indices[i];
		return Array.prototype.slice.call(this.data, place * size, (place + 1) * size);
	}
}

/** @type {Record<string, (buffer: ArrayBuffer, from: number, n: number) => ArrayLike<number>>} */
const READERS = {
	float32: (buffer, from, n) => new Float32Array(buffer, from, n),
	float16: (buffer, from, n) => Float32Array.from(new Uint16Array(buffer, from, n), (x) => HALF[x]),
	uint8: (buffer, from, n) => new Uint8Array(buffer, from, n),
	int32: (buffer, from, n) => new Int32Array(buffer, from, n),
};

/** @param {ArrayBuffer} buffer @returns {Answer} */
export function decode(buffer) {
	const length = new DataView(buffer).getUint32(0, true);
	const start = 4 + length;
	const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
	/** @type {Record<string, Tensor>} */
	const arrays = {};
	for (const [name, { dtype, shape, offset }] of Object.entries(header.arrays ?? {})) {
		const size = shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
		arrays[name] = new Tensor(READERS[dtype](buffer, start + offset, size), shape);
	}
	return { header, arrays, bytes: buffer.byteLength };
}
