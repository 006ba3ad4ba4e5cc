/** The master in its own list, by each way that leads back to it. */

import { appendFileSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createConnection, createServer } from "node:net";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  forget,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  root,
  run,
  RUNTIMES,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";
import { addressOf, relayed, startRelay } from "./relay.ts";

const OWN = "it is this machine, which sends itself no builds";

/** The entry of head, as that of w1 is, and faster. */
function entryOfHead(): string {
  const key = readFileSync(
    `${root("head")}/etc/ssh/ssh_host_ed25519_key.pub`,
    "latin1",
  ).split(" ").slice(0, 2).join(" ");
  return lab("machines", "head", "w1").replace(/^\(list|\)\s*$/g, "")
    .replace('"w1"', '"head"')
    .replace(/\(host-key .*\)/, `(host-key "${key}") (speed 9)`);
}

/** Has head use itself, as `edit` has it, and then these machines. */
function useHead(
  others: readonly string[],
  edit: (entry: string) => string = (entry) => entry,
): void {
  useMachines("head", ["w1"], (text) => {
    const rest = others.length > 0 ? text.replace(/^\(list/, "") : ")";
    return `(list ${edit(entryOfHead())} ${rest}`;
  });
}

for (const runtime of RUNTIMES) {
  const test = suite(`own machine under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    const ssh = `${root("head")}/root/.ssh`;
    const key = readFileSync(`${ssh}/id_ed25519.pub`);
    writeFileSync(`${ssh}/authorized_keys`, key);
    useOffload("head", runtime);
  });

  test("it is left out, told once, and others build", () => {
    useHead(["w1"]);
    const [first, second] = makeWork("head", "--count=2");
    const result = build("head", first!);
    assertOffloaded(first!, result, ["w1"]);
    assert.match(result.stderr, `leaving out 'head': ${OWN}`);
    const again = build("head", second!);
    assertOffloaded(second!, again, ["w1"]);
    assert.not.match(again.stderr, OWN);
    const explained = run(
      "head",
      ...offloadCommand(runtime, "explain", second!),
    );
    assert.match(explained.stdout, OWN);
  });

  test("it is left out by each way that leads there", async () => {
    const address = addressOf("head");
    const socket = `${root("w1")}/tmp/forwarded`;
    const target = `${root("head")}/var/guix/daemon-socket/socket`;
    const forward = createServer((client) => {
      const daemon = createConnection({ path: target });
      client.on("error", () => daemon.destroy()).pipe(daemon);
      daemon.on("error", () => client.destroy()).pipe(client);
    });
    rmSync(socket, { force: true });
    await new Promise<void>((resolve) => {
      forward.listen(socket, resolve);
    });
    const relay = await startRelay("head");
    const drop = "/etc/ssh/sshd_config.d/own.conf";
    const ways: Record<string, () => void> = {
      "another address": () =>
        useHead([], (text) => text.replace('"head"', `"${address}"`)),
      "another port": () => useHead([], relayed),
      "a daemon-socket that is forwarded": () =>
        useMachines("head", ["w1"], (text) =>
          text.replace(
            '(name "w1")',
            '$& (daemon-socket "/tmp/forwarded")',
          )),
      "a relay": () => {
        appendFileSync(
          root("head") + drop,
          "AllowStreamLocalForwarding no\n",
        );
        lab("sshd", "head");
        useHead([]);
      },
    };
    try {
      for (const [way, use] of Object.entries(ways)) {
        use();
        const [derivation] = makeWork("head");
        const hook = startHook("head", { runtime, wantsLocal: true });
        assert.is(await hook.ask(derivation!), "decline", way);
        assert.match(hook.text(), OWN, way);
        hook.close();
        await hook.ended;
      }
    } finally {
      inHost("head", "rm", "-f", drop);
      lab("sshd", "head");
      relay.stop();
      forward.close();
    }
  });

  test("'test' warns of it, and 'status' shows it", () => {
    useHead(["w1"]);
    const tested = run("head", ...offloadCommand(runtime, "test", "--json"));
    assert.is(tested.status, 0, tested.stdout + tested.stderr);
    const reports = JSON.parse(tested.stdout);
    const of = (machine: string) =>
      reports.find((it: { machine: string }) => it.machine === machine);
    assert.is(of("head:22").outcome, "warning");
    const step = of("head:22").steps
      .find(({ outcome }: { outcome: string }) => outcome === "warning");
    assert.is(step.detail, OWN);
    assert.is(of("w1:22").outcome, "ok"); // though it booted with head
    forget("head");
    const shown = run("head", ...offloadCommand(runtime, "status", "--json"));
    const statuses = JSON.parse(shown.stdout);
    assert.equal(
      statuses.map((
        { machine, problem }: Record<string, string>,
      ) => [machine, problem]),
      [["head:22", OWN], ["w1:22", undefined]],
    );
  });

  test.after(() => {
    inHost("head", "rm", "-f", "/root/.ssh/authorized_keys");
    lab("up", "head");
  });
  test.run();
}
