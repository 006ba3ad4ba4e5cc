/** The command that shows what is made of a machine file. */

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ownRuntime, ROOT } from "./helpers.ts";
import { key, machine } from "./scheme.ts";

const command = suite("machine file: offload machines");

/** Runs `offload machines` on a file of this text. */
function runCommand(text: string, ...options: string[]) {
  const directory = mkdtempSync(join(tmpdir(), "offload-"));
  const file = join(directory, "machines.scm");
  writeFileSync(file, text);
  const [program, ...args] = ownRuntime;
  const script = join(ROOT, "mod.ts");
  const { status, stdout, stderr } = spawnSync(
    program,
    [...args, script, "machines", file, ...options],
    {
      encoding: "utf8",
      env: { ...process.env, GUIX_STATE_DIRECTORY: directory },
    },
  );
  rmSync(directory, { recursive: true });
  return { status, stdout, stderr: stderr.replaceAll(file, "f.scm") };
}

command("prints a table", () => {
  const { status, stdout, stderr } = runCommand(
    `(list ${machine()} ${machine("(port 2222)", '"bea.example.org"')})`,
  );
  assert.is(stderr, "");
  assert.is(status, 0);
  assert.match(
    stdout,
    /^machine\tsystems\tuser\t.*\nada:22\tx86_64-linux\tu\t/,
  );
  assert.match(stdout, /\nbea.example.org:2222\tx86_64-linux\tu\t.*\n$/);
});

command("prints JSON, and fails with errors", () => {
  const { status, stdout, stderr } = runCommand(
    `(list ${machine()} ${machine("(port 0) (overload-threshold #f)")})`,
    "--json",
  );
  assert.is(status, 1);
  assert.match(
    stderr,
    /^offload: error: f\.scm:1:\d+: machine 'ada': field 'port'/,
  );
  const [first, ...others] = JSON.parse(stdout);
  assert.equal(others, []);
  assert.equal(Object.keys(first), [
    ...["name", "port", "systems", "user", "private-key", "host-key"],
    ...["compression", "compression-level", "daemon-socket"],
    ...["overload-threshold", "parallel-builds", "speed", "features"],
  ]);
  assert.is(first["host-key"], key);
});

command("says where a file can't be evaluated, and fails", () => {
  const { status, stdout, stderr } = runCommand("(list (build-machine");
  assert.is(status, 1);
  assert.is(stdout.trim().split("\n").length, 1);
  assert.match(
    stderr,
    /^offload: error: f\.scm:\d+:\d+: unexpected end of input/,
  );
});

command("says how to get a file that is not there, unless it is named", () => {
  const [program, ...args] = ownRuntime;
  const machines = (...names: string[]) =>
    spawnSync(program, [...args, join(ROOT, "mod.ts"), "machines", ...names], {
      encoding: "utf8",
      env: { GUIX_CONFIGURATION_DIRECTORY: "/nonexistent" },
    });
  const usual = machines();
  assert.is(usual.status, 0);
  assert.match(
    usual.stderr,
    "hint: run 'offload trust root@HOST --file /nonexistent/machines.scm': ",
  );
  const named = machines("/nonexistent/machines.scm");
  assert.is(named.status, 2);
  assert.match(named.stderr, "failed to open machine file '/nonexistent/mach");
});

command.run();
