/**
 * What is noted of machines and builds. mod.ts hands it on: here are types
 * alone, which neither runtime reads.
 *
 * @module
 */

import type { Context, Facts, Machine, PastBuild } from "./hooks.ts";
import type { Settings } from "./mod.ts";

/** A build slot of a machine, held until it is released or the process ends. */
export interface Slot {
  /** The file that is locked. */
  readonly file: string;
  /** That file's device and inode: another one by its name is another slot. */
  readonly inode: string;
  /** Gives the slot back. */
  release(): void;
}

/** A slot and what it was last used for. */
export type UsedSlot = {
  /** The file that is locked. */
  readonly file: string;
  /** What was built. */
  readonly derivation: string;
  /** Since when, in milliseconds since 1970. */
  readonly time: number;
  /** The file's device and inode then: another one by that name says nothing. */
  readonly inode: string;
};

/** What was seen of a machine. */
export interface MachineRecord {
  /** What it said of itself last. */
  readonly facts: Facts | undefined;
  /** How often it failed since a build last succeeded there. */
  readonly failures: number;
  /** Until when it is left alone, in milliseconds since 1970. */
  readonly until: number;
  /** Why. */
  readonly problem: string;
  /** The fields with which it failed: others are another try. */
  readonly definition: string;
  /** When one of our processes began to ask it, and has no answer yet. */
  readonly asked: number;
  /** Bytes a second that it received. */
  readonly bandwidth: number | undefined;
  /**
   * How many different builds failed there that did well on other machines,
   * lately and since one did well there.
   */
  readonly doubts: number;
}

/** An attempt to build on a machine; times are milliseconds since 1970. */
export interface Attempt {
  /** The machine, NAME:PORT. */
  readonly machine: string;
  /** The number of its slot. */
  readonly slot: number;
  /** When the machine was chosen, for the last time. */
  readonly began: number;
  /** When it was given up. */
  readonly ended: number;
  /** Why it came to nothing. */
  readonly problem: string;
}

/** How far an attempt is: noted as it goes; times as above. */
export interface Course extends Pick<Attempt, "machine" | "slot" | "began"> {
  /** When the machine's daemon answered. */
  connected?: number;
  /** When the inputs were there. */
  sent?: number;
  /** When it was built. */
  built?: number;
  /** When the outputs were here. */
  retrieved?: number;
  /** When it was given up. */
  ended?: number;
  /** How many store items were sent. */
  items?: number;
  /** How many bytes these are. */
  bytesSent?: number;
  /** How many bytes of outputs were retrieved. */
  bytesRetrieved?: number;
  /** How many bytes have moved of what moves now. */
  moved: number;
  /** How many bytes all of that is. */
  total?: number;
  /** Why it came to nothing. */
  problem?: string;
}

/** What the daemon sends for a build that was accepted. */
export interface Work {
  /** What is built. */
  readonly derivation: string;
  /** The derivation and all that it needs, its closure included. */
  readonly needed: readonly string[];
  /** What it is to make. */
  readonly outputs: readonly string[];
  /** When it was asked for, in milliseconds since 1970. */
  readonly asked: number;
  /** When it was accepted. */
  readonly accepted: number;
  /** How far each attempt has come. */
  readonly courses: Course[];
}

/** A build, from its request to its end; times are milliseconds since 1970. */
export interface JournalEntry
  extends Readonly<Omit<Course, "began" | "moved" | "total">> {
  /** File name of the derivation. */
  readonly derivation: string;
  /** Its name, without hash and ".drv". */
  readonly name: string;
  /** Attempts before the last one, to which the rest belongs. */
  readonly earlier: readonly Attempt[];
  /** When guix-daemon asked, for the first time in a row. */
  readonly asked: number;
  /** When that was answered. */
  readonly accepted: number;
  /** When the last attempt began. */
  readonly began?: number;
  /** When it was over. */
  readonly ended: number;
  /** How: `lost` is what no machine could do, `interrupted` what was called off. */
  readonly outcome: "built" | "failed" | "timed-out" | "lost" | "interrupted";
}

/** What is kept of builds, and told of those that are under way. */
export interface Journal {
  /** Tells how far a build in a slot is, until what this returns is called. */
  follow(slot: Pick<Slot, "file">, course: Course): () => void;
  /** Notes that a build that has no slot waits for one, and what else for. */
  saveWait(derivation: string, why: string): void;
  /** Notes a build that is over; returns all that is known of it. */
  save(build: JournalEntry, settings: Settings): JournalEntry;
  /** The same of one that has ended so far, with an error or without. */
  end(work: Work, error: unknown, context: Context): JournalEntry;
}

/**
 * What is seen of machines and builds: by this process, or by all of ours where
 * plugins/ has the means. Losing it loses nothing but speed: no method throws.
 */
export interface Observations {
  /** All that is known of machines, or of one, by NAME:PORT. */
  machines(id?: string): Map<string, MachineRecord>;
  /** Claims the right to ask a machine; false where another process does. */
  claim(id: string, seconds: number): boolean;
  /** Notes what a machine said of itself: it can be reached again. */
  saveFacts(id: string, facts: Facts): void;
  /** Notes that a machine failed. */
  saveFailure(machine: Machine, problem: string, settings: Settings): void;
  /** Notes that a build failed on a machine and did well on another one. */
  saveDoubt(id: string, derivation: string): void;
  /** Notes whether a machine is this one; another definition may not be. */
  saveIdentity(machine: Machine, isThis: boolean): void;
  /** Whether a machine is this one, as far as is known. */
  identity(machine: Machine): boolean | undefined;
  /** The definitions of this machine that are known. */
  ownDefinitions(): Set<string>;
  /** Notes a build that succeeded, and what its machine holds now. */
  saveBuild(
    id: string,
    name: string,
    seconds: number,
    items: readonly string[],
  ): void;
  /** Earlier builds of a name, the latest first. */
  history(name: string): PastBuild[];
  /** Those of `paths` that a machine was seen to hold. */
  held(id: string, paths: readonly string[]): string[];
  /** Notes how fast a machine received a lot, in bytes a second. */
  saveBandwidth(id: string, bandwidth: number): void;
  /** What slots were used for last, unless that was noted to have ended. */
  slots(): UsedSlot[];
  /** Notes what a machine's slot is used for from now on. */
  useSlot(
    id: string,
    slot: Pick<Slot, "file" | "inode">,
    derivation: string,
  ): void;
  /** When machines last began a build, by NAME:PORT. */
  lastUsed(): Map<string, number>;
  /** Notes that a slot is no longer used for a derivation. */
  releaseSlot(file: string, derivation: string): void;
  /** Whether waiting for a slot was not in vain since the last was freed. */
  mayWait(): boolean;
  /** Notes that waiting for a slot was in vain. */
  saveVainWait(): void;
  /** What is kept of builds, where all our processes see the same. */
  readonly journal?: Journal;
}
