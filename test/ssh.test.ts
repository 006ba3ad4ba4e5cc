/** What connections are made of, beside servers and programs that are none. */

import { once } from "node:events";
import { chmodSync, writeFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { execute } from "../plugins/_ssh.ts";
import { withDirectory } from "./helpers.ts";

const test = suite("ssh");

/** Does something where `ssh` is a script. */
async function withProgram(
  script: string,
  work: () => Promise<void>,
): Promise<void> {
  const { PATH } = process.env;
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/ssh`, `#!/bin/sh\n${script}\n`);
    chmodSync(`${directory}/ssh`, 0o755);
    process.env.PATH = `${directory}:${PATH}`;
    await work().finally(() => process.env.PATH = PATH);
  });
}

test("execute() hands on all that a command wrote, however slowly", async () => {
  await withProgram("exec head -c 2000000 /dev/zero", async () => {
    const { process: { channel, ended } } = execute([], "command");
    let size = 0;
    for await (const chunk of channel) {
      size += chunk.length;
      await delay(10); // it has ended by the last ones
    }
    assert.is(size, 2_000_000);
    assert.equal(await ended, { code: 0, errors: "" });
  });
});

test("execute() hands on all that a command is to read", async () => {
  await withProgram("cat; echo the end", async () => {
    const { process: { channel } } = execute([], "command");
    channel.end(Buffer.alloc(300_000, "x"));
    let size = 0;
    for await (const chunk of channel) size += chunk.length;
    assert.is(size, 300_000 + "the end\n".length);
  });
});

test("execute() fails what a command does not read", async () => {
  await withProgram("exit 3", async () => {
    const { process: { channel, ended } } = execute([], "command");
    assert.equal(await ended, { code: 3, errors: "" });
    channel.write("x");
    const [error] = await once(channel, "error");
    assert.instance(error, Error);
  });
});

test("execute() closes a command's input with its channel", async () => {
  await withProgram("cat >/dev/null; exit 4", async () => {
    const { process: { channel, ended } } = execute([], "command");
    channel.destroy();
    assert.equal(await ended, { code: 4, errors: "" });
  });
});

test.run();
