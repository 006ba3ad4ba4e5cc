/** Builds that stay here, where guix-daemon is done with them sooner. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { processRequest } from "../mod.ts";
import type { Plugin, ScoredRequest, Settings } from "../mod.ts";
import { journalOf } from "../plugins/_journal.ts";
import { machine, makeContext, request } from "./context.ts";
import { greeter } from "./helpers.ts";

const test = suite("here");

/** What a request is answered, where a plugin has it stay here. */
async function answerTo(
  asked: Partial<ScoredRequest>,
  settings: Partial<Settings> = {},
) {
  const plugin: Plugin = {
    name: "fake",
    machines: () => [machine({ systems: ["x86_64-linux", "i586-gnu"] })],
    connect: () => ({
      openSocket: () => Promise.resolve(greeter(request().derivation)),
      exec: () => Promise.reject(new Error("it runs nothing")),
      failure: () => undefined,
      close: () => {},
    }),
    score: () => 1,
    defer: () => ({ why: "of the test", rank: 0, isHeld: false, isHere: true }),
  };
  const { context } = makeContext({ plugins: [plugin] });
  const own = { ...context, settings: { ...context.settings, ...settings } };
  const answers: string[] = [];
  const conversation = {
    readLine: () => Promise.resolve(undefined),
    answer: (word: string) => void answers.push(word),
  };
  const whole = request(asked);
  own.observations.journal!.saveWait(whole.derivation, "busy");
  await processRequest(whole, conversation, own);
  const journal = journalOf(own)!;
  return [answers.join(" "), journal.waiting().length, journal.counts().length];
}

test("what stays here is declined, and neither waits nor is counted", async () => {
  assert.equal(await answerTo({ wantsLocal: true }), ["decline", 0, 0]);
  const related = { wantsLocal: true, system: "x86_64-linux" };
  assert.equal(await answerTo(related), ["decline", 0, 0]);
});

test("what guix-daemon can't build is not declined, whatever plugins say", async () => {
  assert.equal(await answerTo({ wantsLocal: false }), ["postpone", 1, 0]);
  const foreign = { wantsLocal: true, system: "i586-gnu" };
  assert.equal(await answerTo(foreign), ["postpone", 1, 0]);
  const asked = { wantsLocal: true };
  const settings = { buildLocally: false };
  assert.equal(await answerTo(asked, settings), ["postpone", 1, 0]);
});

test.run();
