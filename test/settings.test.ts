/** Settings: settings.json, the environment, and the schema. */

import {
  chmodSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  describeSettings,
  loadBuiltins,
  OffloadError,
  readSettings,
} from "../mod.ts";
import { manual } from "../scripts/manual.ts";
import { settingsSchema, settingsTable } from "../scripts/settings.ts";
import { throws, withDirectory } from "./helpers.ts";

const test = suite("settings");

/** Reads the settings from a file of this text. */
function settingsOf(text: string, environment: Record<string, string> = {}) {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    writeFileSync(`${directory}/settings.json`, text);
    return readSettings(directory, environment);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

function assertRefused(message: RegExp, text: string, variables = {}): void {
  assert.throws(
    () => settingsOf(text, variables),
    (error: unknown) =>
      error instanceof OffloadError && message.test(error.message),
  );
}

test("readSettings() has defaults where there is no file", () => {
  const settings = readSettings("/nonexistent", {});
  assert.is(settings.decisionTimeout, 3);
  assert.is(settings.buildLocally, true);
  assert.is(settings.score, "auto");
});

test("readSettings() prefers the environment to the file", () => {
  const text = '{"$schema": "x", "backoff": 1, "score": "locality"}';
  assert.is(settingsOf(text).backoff, 1);
  const variables = { OFFLOAD_BACKOFF: "2.5", OFFLOAD_BUILD_LOCALLY: "false" };
  const settings = settingsOf(text, variables);
  assert.is(settings.backoff, 2.5);
  assert.is(settings.buildLocally, false);
  assert.is(settings.score, "locality");
});

test("readSettings() names what is unknown or wrong", () => {
  assertRefused(/settings\.json: unknown setting 'backof'/, '{"backof": 1}');
  assertRefused(/'backoff': expected a number, got "1"/, '{"backoff": "1"}');
  assertRefused(/'buildLocally': expected a boolean/, '{"buildLocally": 1}');
  assertRefused(/'attempts': 0 is not between 1 and/, '{"attempts": 0}');
  assertRefused(/settings\.json: expected an object/, "[]");
  assertRefused(/settings\.json: /, '{"backoff": 1,}');
  assertRefused(/unknown setting '__proto__'/, '{"__proto__": 1}');
  assertRefused(/'use': expected an? object, got \[\]/, '{"use": []}');
  assertRefused(/'use': expected an? object, got "drain"/, '{"use": "drain"}');
});

test("readSettings() refuses what others could have written", () =>
  withDirectory((directory) => {
    const file = `${directory}/settings.json`;
    writeFileSync(file, "{}");
    chmodSync(file, 0o666);
    throws(() => readSettings(directory, {}), /settings\.json: others than/);
    chmodSync(file, 0o644);
    readSettings(directory, {});
    chmodSync(directory, 0o777);
    throws(() => readSettings(directory, {}), /: others than/);
  }));

test("readSettings() names a variable that is wrong", () => {
  assertRefused(/OFFLOAD_ATTEMPTS: NaN is not/, "{}", {
    OFFLOAD_ATTEMPTS: "many",
  });
  assertRefused(/OFFLOAD_ATTEMPTS: expected a number/, "{}", {
    OFFLOAD_ATTEMPTS: "",
  });
  assertRefused(/OFFLOAD_BUILD_LOCALLY: expected a boolean/, "{}", {
    OFFLOAD_BUILD_LOCALLY: "no",
  });
});

test("readSettings() reads an object from a variable", () => {
  const { use } = settingsOf('{"use": {"leases": {}}}', {
    OFFLOAD_USE: '{"drain": {"file": "x"}}',
  });
  assert.equal(use, { drain: { file: "x" } });
  assertRefused(/OFFLOAD_USE: .*JSON/, "{}", { OFFLOAD_USE: "drain" });
  assertRefused(/OFFLOAD_USE: .*JSON/, "{}", { OFFLOAD_USE: "{drain}" });
});

/** Text of a file of the checkout. */
function read(file: string): string {
  return readFileSync(new URL(`../${file}`, import.meta.url), "utf8");
}

const HINT = "run 'node scripts/settings.ts'";

test("settingsSchema() is what stands in plugins/settings.schema.json", async () => {
  const schema = settingsSchema(await loadBuiltins());
  const text = `${JSON.stringify(schema, null, 2)}\n`;
  assert.is(read("plugins/settings.schema.json"), text, HINT);
});

test("settingsTable() is what stands in plugins/settings.md", async () => {
  const table = settingsTable(await loadBuiltins());
  assert.ok(read("plugins/settings.md").includes(`\n\n${table}\n`), HINT);
});

test("the manual page tells of every setting", () => {
  const page = manual("2026-01-01").replaceAll("\n", " ");
  for (const [name, setting] of Object.entries(describeSettings())) {
    assert.ok(page.includes(`.It Va ${name} ${setting.description}: `), name);
  }
});

test.run();
