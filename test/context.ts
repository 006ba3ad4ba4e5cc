/**
 * A context for tests of what needs no Guix host.
 *
 * @module
 */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import process from "node:process";
import {
  asOwner,
  builtinNames,
  machineFromFields,
  readSettings,
  writableDirectory,
} from "../mod.ts";
import type {
  Candidate,
  Context,
  Log,
  Machine,
  Plugin,
  ScoredRequest,
} from "../mod.ts";
import { NOTHING_KNOWN } from "../plugins/_contract.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { checkAnswers } from "../plugins/_site.ts";

/** A host key that is well-formed. */
export const HOST_KEY =
  "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHy+IsFpXiJH78ydyzMC/Wy+sp/fPwGXHhEiljoqqSf5";

/** A machine with these fields. */
export function machine(fields: Partial<Machine> = {}): Machine {
  return {
    name: "machine",
    port: 22,
    systems: ["x86_64-linux"],
    user: "offload",
    privateKey: "/nonexistent",
    hostKey: HOST_KEY,
    compression: "none",
    compressionLevel: 3,
    daemonSocket: "/var/guix/daemon-socket/socket",
    overloadThreshold: 0.8,
    parallelBuilds: 1,
    speed: 1,
    features: [],
    ...fields,
  };
}

/** A candidate that is such a machine. */
export function candidate(fields: Partial<Machine> = {}): Candidate {
  const made = machine(fields);
  return {
    machine: made,
    id: `${made.name}:${made.port}`,
    facts: { time: Date.now(), load: 0, cores: 4 },
    freeSlots: () => 1,
    running: () => [],
    quickness: undefined,
    holds: () => [],
    bandwidth: undefined,
    lastUsed: undefined,
  };
}

/** A request for any build. */
export function request(fields: Partial<ScoredRequest> = {}): ScoredRequest {
  return {
    wantsLocal: false,
    system: "x86_64-linux",
    derivation: `/gnu/store/${"0".repeat(32)}-hello-2.12.drv`,
    features: [],
    name: "hello-2.12",
    time: Date.now(),
    isAccepted: false,
    ...NOTHING_KNOWN,
    ...fields,
  };
}

const made: string[] = [];

process.on("exit", () => {
  for (const each of made) rmSync(each, { recursive: true, force: true });
});

/** A new directory, which is there until all suites have run. */
function makeStateDirectory(): string {
  const directory = mkdtempSync(`${tmpdir()}/offload-state-`);
  made.push(directory);
  return directory;
}

/** Plugins as they come of their files: a site's answers are checked. */
function asLoaded(plugins: readonly Plugin[]): Plugin[] {
  const known = builtinNames();
  return plugins.map((it) => known.includes(it.name) ? it : checkAnswers(it));
}

/** A context with these parts, and the warnings that it collects. */
export function makeContext(
  parts: Partial<Context> = {},
): { context: Context; warnings: string[] } {
  const warnings: string[] = [];
  const warn = (problem: unknown) => {
    warnings.push(problem instanceof Error ? problem.message : `${problem}`);
  };
  const log: Log = {
    info: () => {},
    trace: () => {},
    debug: () => {},
    warn,
    error: warn,
  };
  const stateDirectory = makeStateDirectory();
  const context: Context = {
    log,
    signal: new AbortController().signal,
    // Only what never answers is to meet it: these hooks wait for nothing.
    settings: { ...readSettings("/nonexistent", {}), hookTimeout: 0.1 },
    options: {},
    environment: {},
    configDirectory: "/nonexistent",
    stateDirectory,
    storeDirectory: "/gnu/store",
    daemonSocket: "/nonexistent",
    system: "x86_64-linux",
    buildOptions: { maxSilentTime: 60, buildTimeout: 600 },
    buildLog: () => {},
    guix: "guix",
    problems: [],
    report: ({ message }) => warnings.push(message),
    asOwner,
    writable: writableDirectory,
    machineFile: () => ({
      file: "/nonexistent",
      machines: [],
      problems: [],
    }),
    machineFromFields,
    observations: new SharedObservations(stateDirectory, log),
    ...parts,
    plugins: asLoaded(parts.plugins ?? []),
  };
  return { context, warnings };
}
