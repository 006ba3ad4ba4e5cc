/** mod.ts and deps.ts without what else there is: what they do in its place. */

import { generateKeyPairSync } from "node:crypto";
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { machine, makeContext } from "./context.ts";
import { ROOT } from "./helpers.ts";

const test = suite("mod.ts alone");

let directory = "";
let alone: typeof import("../mod.ts");

// In the checkout, where the libraries are found.
test.before(async () => {
  directory = mkdtempSync(`${ROOT}/test/alone-`);
  for (const file of ["mod.ts", "deps.ts"]) {
    copyFileSync(`${ROOT}/${file}`, `${directory}/${file}`);
  }
  alone = await import(`${directory}/mod.ts`);
});
test.after(() => rmSync(directory, { recursive: true }));

test("loadSite() says that it has nothing to load plugins with", async () => {
  const site = `${directory}/site`;
  const problems: Error[] = [];
  const { context: { log } } = makeContext();
  const warn = (problem: unknown) => void problems.push(problem as Error);
  const load = () => alone.loadSite(site, 1, { ...log, warn });
  assert.equal(await load(), { plugins: [], failures: 0 });
  mkdirSync(site);
  assert.equal(await load(), { plugins: [], failures: 0 });
  assert.equal(problems, []);
  writeFileSync(`${site}/own.ts`, "throw new Error();");
  assert.equal(await load(), { plugins: [], failures: 1 });
  assert.equal(
    problems.map(({ message }) => message),
    [`nothing here loads the plugins in '${site}'`],
  );
});

test("openSession() says why it fails, without what may help", async () => {
  const server = createServer((socket) => socket.end("no SSH here\r\n"));
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const { privateKey } = generateKeyPairSync("ed25519");
  const file = `${directory}/key`;
  const pem = privateKey.export({ format: "pem", type: "pkcs8" });
  writeFileSync(file, pem, { mode: 0o600 });
  const { context } = makeContext();
  const plugins = await alone.loadPlugins(
    "/none",
    context.settings,
    context.log,
  );
  const there = machine({ name: "127.0.0.1", port, privateKey: file });
  try {
    await alone.openSession(there, { ...context, plugins });
    assert.unreachable();
  } catch (error) {
    const { message, code, hint } = error as InstanceType<
      typeof alone.OffloadError
    >;
    assert.match(message, /^failed to connect to '127\.0\.0\.1': ./);
    assert.is(code, "connect");
    assert.is(hint, undefined);
  } finally {
    server.close();
  }
});

test.run();
