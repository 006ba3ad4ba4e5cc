/** What connections are made of, beside servers and programs that are none. */

import { KeyObject } from "node:crypto";
import { once } from "node:events";
import { chmodSync, writeFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import process from "node:process";
import type { Duplex } from "node:stream";
import { buffer } from "node:stream/consumers";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { deno, quicken, ssh2 } from "../deps.ts";
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

/** The keys of packets in GCM, by the place where ssh2 has them. */
function packetKeys(client: unknown): readonly unknown[] {
  const { _protocol: { _cipher, _decipher } } = client as {
    _protocol: {
      _cipher: { _encKey: unknown };
      _decipher: { _decipherKey: unknown };
    };
  };
  return [_cipher._encKey, _decipher._decipherKey];
}

/** Whether all are of the kind of which the runtime is the quickest. */
function areQuick(keys: readonly unknown[]): boolean {
  return keys.every((key) =>
    deno === undefined ? key instanceof KeyObject : key instanceof Uint8Array
  );
}

test("quicken() has packets made of keys, also of new ones", async () => {
  const { private: hostKey } = ssh2.utils.generateKeyPairSync("ed25519");
  const exchanged = Promise.withResolvers<void>();
  const server = new ssh2.Server({ hostKeys: [hostKey] }, (peer) => {
    peer.on("authentication", (it) => it.accept());
    peer.on("error", () => {});
    peer.on("session", (accept) => {
      accept().on("exec", (acceptCommand) => {
        const channel = acceptCommand();
        peer.rekey(() => channel.end("after the exchange"));
      });
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  const client = quicken(new ssh2.Client());
  let count = 0;
  client.on("handshake", () => ++count === 2 && exchanged.resolve());
  try {
    client.connect({
      ...{ host: "127.0.0.1", port, username: "u", password: "p" },
      algorithms: { cipher: ["aes128-gcm@openssh.com"] },
    });
    await once(client, "ready");
    const before = packetKeys(client);
    assert.ok(areQuick(before));
    const channel = await new Promise<Duplex>((resolve, reject) =>
      client.exec("x", (error, it) => error ? reject(error) : resolve(it))
    );
    assert.is((await buffer(channel)).toString(), "after the exchange");
    await exchanged.promise;
    const after = packetKeys(client);
    assert.ok(areQuick(after));
    assert.ok(after.every((key, index) => key !== before[index]));
  } finally {
    client.end();
    server.close();
  }
});

test.run();
