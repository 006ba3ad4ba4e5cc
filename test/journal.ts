/**
 * Builds for tests of what is made of the journal.
 *
 * @module
 */

import type { JournalEntry } from "../plugins/_journal.ts";

/** A build that has ended just now, with these fields. */
export function makeEntry(fields: Partial<JournalEntry> = {}): JournalEntry {
  const now = Date.now();
  const { name = "hello-2.12" } = fields;
  return {
    derivation: `/gnu/store/${"0".repeat(32)}-${name}.drv`,
    name,
    machine: "w1:22",
    slot: 0,
    earlier: [],
    asked: now - 9000,
    accepted: now - 8500,
    began: now - 8500,
    connected: now - 8000,
    sent: now - 7000,
    built: now - 2000,
    retrieved: now - 1000,
    ended: now,
    items: 3,
    bytesSent: 12345,
    bytesRetrieved: 23456,
    outcome: "built",
    ...fields,
  };
}
