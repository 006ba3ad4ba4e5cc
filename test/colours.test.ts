/** The colours of what is drawn, and who can tell them apart. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { OUTCOMES } from "../plugins/_journal.ts";
import { PHASES } from "../plugins/_phases.ts";
import { DARK, LIGHT } from "../plugins/_report_style.ts";
import type { Palette } from "../plugins/_report_style.ts";

const test = suite("colours");

/**
 * How the colour-blind see linear light (G. M. Machado, M. M. Oliveira, L. A. F.
 * Fernandes, "A Physiologically-based Model for Simulation of Color Vision
 * Deficiency", 2009), all of it missing.
 */
const SIGHTS: Readonly<Record<string, readonly number[]>> = {
  all: [1, 0, 0, 0, 1, 0, 0, 0, 1],
  protanopia: [0.152286, 1.052583, -0.204868]
    .concat([0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]),
  deuteranopia: [0.367322, 0.860646, -0.227968]
    .concat([0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]),
  tritanopia: [1.255528, -0.076749, -0.178779]
    .concat([-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]),
};

type Triple = readonly number[];

/** A matrix of nine numbers times a vector. */
function times(matrix: readonly number[], vector: Triple): number[] {
  return [0, 3, 6].map((row) =>
    vector.reduce((sum, it, i) => sum + it * matrix[row + i]!, 0)
  );
}

/** Linear light of a colour. */
function lightOf(colour: string): number[] {
  return [1, 3, 5].map((at) => {
    const it = parseInt(colour.slice(at, at + 2), 16) / 255;
    return it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4;
  });
}

/** The place of linear light in Oklab, where distances are as they are seen. */
function oklab(light: Triple): number[] {
  const cones = times(
    [0.4122214708, 0.5363325363, 0.0514459929]
      .concat([0.2119034982, 0.6806995451, 0.1073969566])
      .concat([0.0883024619, 0.2817188376, 0.6299787005]),
    light,
  ).map(Math.cbrt);
  return times(
    [0.2104542553, 0.793617785, -0.0040720468]
      .concat([1.9779984951, -2.428592205, 0.4505937099])
      .concat([0.0259040371, 0.7827717662, -0.808675766]),
    cones,
  );
}

/** How bright one colour is beside another (WCAG 2). */
function contrast(one: string, other: string): number {
  const [dark, bright] = [one, other].map((colour) => {
    const [red, green, blue] = lightOf(colour);
    return 0.2126 * red! + 0.7152 * green! + 0.0722 * blue!;
  }).sort((a, b) => a - b);
  return (bright! + 0.05) / (dark! + 0.05);
}

/** The least distance of two of some colours, for some eyes. */
function leastDistance(
  palette: Palette,
  names: readonly string[],
  sight: readonly number[],
): number {
  const seen = names.map((name) => {
    const light = times(sight, lightOf(palette[name]!));
    return oklab(light.map((it) => Math.min(1, Math.max(0, it))));
  });
  const distances = seen.flatMap((one, index) =>
    seen.slice(index + 1).map((other) =>
      Math.hypot(...one.map((it, axis) => it - other[axis]!))
    )
  );
  return Math.min(...distances);
}

test("the colour-blind can tell phases apart, and outcomes", () => {
  const phases = PHASES.filter((it) => it !== "failed attempts");
  const outcomes = OUTCOMES.filter((it) => it !== "built").concat();
  for (const palette of [LIGHT, DARK]) {
    for (const names of [phases, ["building", ...outcomes]]) {
      for (const [name, sight] of Object.entries(SIGHTS)) {
        const distance = leastDistance(palette, names, sight);
        assert.ok(distance > 0.1, `${name}: ${distance} of ${names}`);
      }
      for (const name of names) {
        const there = contrast(palette[name]!, palette.back!);
        assert.ok(there > 3, `${name}: ${there}`);
      }
    }
    for (const back of [palette.back!, palette.panel!]) {
      assert.ok(contrast(palette.text!, back) > 7);
      assert.ok(contrast(palette.muted!, back) > 4.5);
    }
  }
  // Red and green of a kind can't be told apart: this is a test.
  const usual = { a: "#b06000", b: "#6f8000" };
  const { deuteranopia } = SIGHTS;
  assert.ok(leastDistance(usual, ["a", "b"], deuteranopia!) < 0.05);
});

test.run();
