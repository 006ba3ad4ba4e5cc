/**
 * What is measured: the rows of the benchmark's table, and its columns.
 *
 * @module
 */

/** Something to measure: builds, all started at once. */
export interface Case {
  readonly name: string;
  /** Options of scripts/lab/work.scm. */
  readonly work: readonly string[];
  /** How many builds: 1 unless told. */
  readonly count?: number;
  /** How many of them the reference has to do, where all would take too long. */
  readonly sample?: number;
  /** How many builds at a time the machines do together: 4 unless told. */
  readonly slots?: number;
  /** How often, in each column. */
  readonly runs: number;
  /** Whether `--quick` leaves it out. */
  readonly slow?: boolean;
  /** Whether so much is moved that it would fill the memory in the end. */
  readonly bulk?: boolean;
  /** Milliseconds there and back, by a relay to the one machine that is used. */
  readonly roundTrip?: number;
  /** Seconds that it would take if builds alone took time. */
  readonly ideal?: number;
  /** Whether the hook's answer alone is measured, from the start of the hook. */
  readonly isAnswer?: boolean;
}

const MEBIBYTE = 2 ** 20;

const SMALL: readonly Case[] = [
  { name: "time to # accept", work: [], runs: 5, isAnswer: true },
  { name: "one trivial build", work: [], runs: 5 },
  {
    name: "20 trivial builds, 8 slots",
    work: [],
    ...{ count: 20, slots: 8, runs: 3 },
  },
  {
    name: "1,000 trivial builds, 8 slots",
    work: [],
    ...{ count: 1000, sample: 40, slots: 8, runs: 1, slow: true },
  },
  {
    name: "20 builds of 2 s, 4 slots",
    work: ["--seconds=2"],
    ...{ count: 20, runs: 1, slow: true, ideal: 10 },
  },
];

const INPUTS: readonly Case[] = [
  ...[1, 100, 1000, 5000].map((inputs) => ({
    name: `${inputs.toLocaleString("en")} small input${inputs > 1 ? "s" : ""}`,
    work: [`--inputs=${inputs}`],
    runs: inputs > 1000 ? 1 : 3,
    slow: inputs !== 100,
  })),
  {
    name: "a directory of 2,000 files",
    work: ["--input-files=2000"],
    runs: 2,
    slow: true,
  },
];

const INPUT_OF_400_MIB = ["--inputs=1", `--input-size=${400 * MEBIBYTE}`];
const OUTPUT_OF_300_MIB = [`--output-size=${300 * MEBIBYTE}`];

/** Where there are two builds, each machine has one of them. */
const BULK: readonly Case[] = [
  { name: "one input of 400 MiB", work: INPUT_OF_400_MIB },
  { name: "an output of 300 MiB", work: OUTPUT_OF_300_MIB },
  { name: "2 inputs of 400 MiB at once", work: INPUT_OF_400_MIB, count: 2 },
  { name: "2 outputs of 300 MiB at once", work: OUTPUT_OF_300_MIB, count: 2 },
].map((each) => ({ ...each, slots: 2, runs: 2, slow: true, bulk: true }));

const DISTANT: readonly Case[] = [
  ...[10, 50, 150].map((roundTrip) => ({
    name: `one trivial build, ${roundTrip} ms away`,
    work: [],
    ...{ roundTrip, slots: 2, runs: 3, slow: roundTrip !== 50 },
  })),
  {
    name: "40 MiB in and out, 50 ms away",
    work: [
      ...["--inputs=1", "--compressible"],
      ...[`--input-size=${40 * MEBIBYTE}`, `--output-size=${40 * MEBIBYTE}`],
    ],
    ...{ roundTrip: 50, slots: 2, runs: 1, slow: true },
  },
];

/** The rows of the table. */
export const CASES: readonly Case[] = [
  ...SMALL,
  ...INPUTS,
  ...BULK,
  ...DISTANT,
];

/** How builds are done. */
export interface Column {
  /**
   * By `guix offload`; by Offload with a process for each build, or by the one
   * that stays, which has done a few; or on head itself.
   */
  readonly kind: "reference" | "cold" | "warm" | "local";
  /** The environment of guix-daemon that has it done so. */
  readonly variables: readonly string[];
}

/** The column that others are compared with. */
export const REFERENCE = "guix offload";

/** The columns of the table, by name. */
export const COLUMNS: Readonly<Record<string, Column>> = {
  [REFERENCE]: { kind: "reference", variables: [] },
  "Node, cold": offload("node", "cold"),
  "Node, warm": offload("node", "warm"),
  "Deno, cold": offload("deno", "cold"),
  "Deno, warm": offload("deno", "warm"),
  "local": { kind: "local", variables: [] },
};

function offload(runtime: string, kind: "cold" | "warm"): Column {
  return {
    kind,
    variables: [
      ...["GUIX=/offload/scripts/guix", `OFFLOAD_RUNTIME=${runtime}`],
      `OFFLOAD_RESIDENT=${kind === "warm"}`,
    ],
  };
}

/** How many builds a column has to do of a case. */
export function countFor(
  { count = 1, sample = count }: Case,
  { kind }: Column,
) {
  return kind === "reference" ? sample : count;
}
