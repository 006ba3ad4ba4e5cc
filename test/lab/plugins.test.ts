/** Plugins and their real counterparts: Avahi, OpenSSH, a second master. */

import {
  existsSync,
  globSync,
  mkdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { askHook, closure } from "./hook.ts";
import {
  ACQUAINTED,
  assertOffloaded,
  build,
  buildCommand,
  buildWork,
  forget,
  inHost,
  lab,
  makeWork,
  meetMachines,
  offloadCommand,
  ROOT,
  root,
  run,
  RUNTIMES,
  start,
  STATE,
  SYSTEM,
  until,
  useMachines,
  useOffload,
  usePlugins,
  watch,
  within,
  wrongKey,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";
import { withoutKept } from "./suites.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Asks a new hook once, with these settings of plugins. */
function ask(
  derivation: string,
  runtime: Runtime,
  plugins: Readonly<Record<string, object>>,
  ...variables: readonly string[]
): ReturnType<typeof askHook> {
  const text = `OFFLOAD_USE='${JSON.stringify(plugins)}'`;
  return askHook(derivation, {
    runtime,
    wantsLocal: true,
    variables: [text, ...variables],
  });
}

/** Publishes build machines by Avahi while `work` runs, all inside head. */
async function whilePublished(
  services: readonly (readonly [host: string, ...words: string[]])[],
  work: () => Promise<void> | void,
): Promise<void> {
  const file = `${root("head")}/etc/avahi/avahi-daemon.conf`;
  // It looks at no loopback interface unless told.
  writeFileSync(
    file,
    "[server]\nuse-ipv6=no\nallow-interfaces=lo\n[publish]\n" +
      "publish-workstation=no\npublish-hinfo=no\n[rlimits]\n",
  );
  inHost(
    "head",
    "sh",
    "-c",
    "mkdir -p /run/dbus; rm -f /run/dbus/pid; " +
      "dbus-daemon --system --fork && avahi-daemon --daemonize --no-chroot",
  );
  const published = services.map(([host, name, ...words]) =>
    watch(start(
      "head",
      ...["avahi-publish-service", "--host", `${host}.local`, name!],
      ...["_guix-build._tcp", "22", ...words],
    ))
  );
  try {
    await until(
      "the services are published",
      () => published.every(({ text }) => text().includes("Established")),
    );
    await work();
  } finally {
    for (const { child } of published) child.kill();
    inHost(
      "head",
      "sh",
      "-c",
      "avahi-daemon --kill; kill $(cat /run/dbus/pid)",
    );
  }
}

function hostKey(machine: string): string {
  const file = `${root(machine)}/etc/ssh/ssh_host_ed25519_key.pub`;
  return readFileSync(file, "utf8").split(" ").slice(0, 2).join(" ");
}

/** The fields of a machine of the lab, as JSON lists have them. */
function fieldsOf(
  name: string,
  fields: Readonly<Record<string, unknown>> = {},
): Record<string, unknown> {
  return {
    ...{ name, systems: [SYSTEM], user: "root", "host-key": hostKey(name) },
    "private-key": "/root/.ssh/id_ed25519",
    ...{ "overload-threshold": false, "parallel-builds": 2, ...fields },
  };
}

/** What runs a script on a master as the hook is run. */
function runtimeCommand(runtime: Runtime): string[] {
  const node = "/offload/node_modules/node/bin/node";
  const [deno] = globSync("/offload/node_modules/@deno/*/deno".replace(
    "/offload/",
    ROOT,
  ));
  return runtime === "node"
    ? [node, "--disable-warning=ExperimentalWarning"]
    : [
      deno!.replace(ROOT, "/offload/"),
      "run",
      "--allow-all",
      "--config=/offload/deno.json",
    ];
}

/** Checks the plugins that need a real machine; prints the names. */
const CONTRACT = `
import { readFileSync } from "node:fs";
import { argv } from "node:process";
import * as contract from "/offload/plugins/_contract.ts";
import { loadBuiltins, loadPlugins, readSettings } from "/offload/mod.ts";
import { parseMachines } from "/offload/plugins/_machine_list.ts";

const settings = readSettings("/nonexistent", {});
const [guix] = await loadPlugins("/nonexistent", settings, console);
const plugins = [guix, ...await loadBuiltins()];
const named = (name) => plugins.find((plugin) => plugin.name === name);
const context = contract.makePluginContext(named("guix"));
const text = "[" + readFileSync("/tmp/machine.json", "utf8") + "]";
const [machine] = parseMachines(text, "list", context, new Map());
const done = [];
for (const name of ["guix", "openssh"]) {
  await contract.checkConnect(named(name), machine);
  done.push(name);
}
for (const name of ["guix", "archive-command"]) {
  await contract.checkTransport(named(name), machine, argv.slice(2));
  done.push(name);
}
const admitted = await contract.checkAdmit(named("leases"), machine);
if (admitted === true) done.push("leases");
console.log(done.join(" "));
process.exit();
`;

function suiteUnder(runtime: Runtime): void {
  const test = suite(`plugins under ${runtime}`);

  withoutKept(test, runtime);

  test("json-machines and command list machines", () => {
    const list = (name: string) => JSON.stringify([fieldsOf(name)]);
    writeFileSync(`${root("head")}/etc/guix/machines.json`, list("w1"));
    writeFileSync(`${root("head")}/etc/guix/other.json`, list("w2"));
    useMachines("head", ["w1"], () => "(list)");
    usePlugins("head", runtime, { "json-machines": {} });
    const [first, result] = buildWork();
    assertOffloaded(first, result, ["w1"]);
    usePlugins("head", runtime, {
      command: { command: "cat /etc/guix/other.json" },
    });
    const [second, other] = buildWork();
    assertOffloaded(second, other, ["w2"]);
  });

  test("drain takes effect at once, and asks no machine", async () => {
    useMachines("head", ["w1", "w2"]);
    const [derivation] = makeWork("head");
    const file = `${root("head")}/tmp/drain`;
    const plugins = { drain: { file: "/tmp/drain" } };
    const explain = () => {
      const variables = [`OFFLOAD_USE=${JSON.stringify(plugins)}`];
      const { stdout } = run(
        ...["head", "env", ...variables] as const,
        ...offloadCommand(runtime, "explain", derivation!),
      );
      return stdout;
    };
    writeFileSync(file, "w1 # new disk\n");
    const text = explain();
    assert.match(text, /^w1:22\s.*\sdrained by '\/tmp\/drain': new disk\s*$/m);
    assert.match(text, /^w1:22\s+2 of 2\s+-\s/m);
    assert.match(text, /^w2:22\s.*\stakes it\s*$/m);
    writeFileSync(file, "w1\nw2\n");
    assert.is((await ask(derivation!, runtime, plugins)).answer, "decline");
    writeFileSync(file, "");
    assert.is((await ask(derivation!, runtime, plugins)).answer, "accept");
  });

  test("round-robin takes turns", async () => {
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => text.replace('(name "w1")', '(name "w1") (speed 9.)'),
    );
    useOffload("head", runtime, "OFFLOAD_SCORE=round-robin", ACQUAINTED);
    await meetMachines(runtime);
    const used = [1, 2, 3, 4].map(() => {
      const [derivation, result] = buildWork();
      return assertOffloaded(derivation, result, ["w1", "w2"]);
    });
    assert.is.not(used[0], used[1]);
    assert.equal(used, [used[0], used[1], used[0], used[1]]);
  });

  test("pressure learns what waits on a machine", () => {
    forget("head");
    const [derivation] = makeWork("head");
    const variables = ['OFFLOAD_USE={"pressure": {}}'];
    const { stdout } = run(
      ...["head", "env", ...variables] as const,
      ...offloadCommand(runtime, "explain", derivation!, "--json"),
    );
    const [{ facts, scores }] = JSON.parse(stdout);
    assert.ok(facts.memory > 0);
    assert.ok(existsSync("/proc/pressure") === (facts.pressure !== undefined));
    const { pressure } = scores.byPlugin;
    assert.ok(pressure <= 0 && pressure >= -1, String(pressure));
  });

  test("openssh minds ~/.ssh/config, jumps and has an agent", () => {
    // Nobody has that name, and nobody that key; ssh knows better.
    useMachines(
      "head",
      ["w1"],
      (text) =>
        text.replace('(name "w1")', '(name "hidden")')
          .replace("/root/.ssh/id_ed25519", "/nonexistent"),
    );
    const home = `${root("head")}/root/.ssh`;
    writeFileSync(`${home}/known_hosts`, `w2 ${hostKey("w2")}\n`);
    writeFileSync(
      `${home}/config`,
      "Host hidden\n  HostName w1\n  ProxyJump w2\n" +
        "Host *\n  IdentityFile /nonexistent\n",
    );
    const agent = "/tmp/agent.sock";
    rmSync(root("head") + agent, { force: true });
    inHost("head", "ssh-agent", "-a", agent);
    const authenticate = `SSH_AUTH_SOCK=${agent}`;
    inHost("head", "env", authenticate, "ssh-add", "/root/.ssh/id_ed25519");
    useOffload("head", runtime, "OFFLOAD_CONNECT=openssh", authenticate);
    try {
      const [derivation, result] = buildWork("--inputs=3");
      assert.is(result.status, 0, result.stderr);
      assert.match(result.stderr, `offloading '${derivation}' to 'hidden'`);
    } finally {
      inHost("head", "pkill", "-f", `ssh-agent -a ${agent}`);
      for (const name of ["config", "known_hosts"]) rmSync(`${home}/${name}`);
    }
  });

  test("openssh believes the pinned host key alone", async () => {
    useMachines("head", ["w1"], wrongKey);
    // Whatever the account has come to believe.
    const known = `w1 ${hostKey("w1")}\nmachine ${hostKey("w1")}\n`;
    writeFileSync(`${root("head")}/root/.ssh/known_hosts`, known);
    const [derivation] = makeWork("head");
    const { answer, stderr } = await ask(
      ...[derivation!, runtime, {}, "OFFLOAD_CONNECT=openssh"] as const,
    );
    rmSync(`${root("head")}/root/.ssh/known_hosts`);
    assert.is(answer, "decline");
    assert.match(stderr, /failed to connect to 'w1': .*[Hh]ost key/);
    assert.match(stderr, "hint: if it was changed on purpose");
  });

  test("built-in plugins keep the contract with a real machine", () => {
    writeFileSync(`${root("head")}/tmp/contract.ts`, CONTRACT);
    const file = `${root("head")}/tmp/machine.json`;
    writeFileSync(file, JSON.stringify(fieldsOf("w1")));
    const [derivation] = makeWork("head", "--inputs=3");
    const paths = closure("head", derivation!);
    const [program, ...options] = runtimeCommand(runtime);
    const { status, stdout, stderr } = run(
      "head",
      ...[program!, ...options, "/tmp/contract.ts", ...paths],
    );
    assert.is(status, 0, stderr);
    assert.is(stdout, "guix openssh guix archive-command leases\n");
  });

  test("the examples of plugins/README.md work together", async () => {
    const known = `w2 ${hostKey("w2")}\n`;
    writeFileSync(`${root("head")}/root/.ssh/known_hosts`, known);
    const directory = `${root("head")}/etc/guix/offload`;
    mkdirSync(directory, { recursive: true });
    const page = readFileSync(`${ROOT}plugins/README.md`, "utf8");
    const examples = page.matchAll(/^```ts\n\/\/ (\w+\.ts)\n([^]*?)^```$/gm);
    // In the place of the machines and programs that they speak of.
    const names: Record<string, string> = {
      ...{ "w8.internal": "w1", w7: "w1" },
      ...{ "gate.example.org": "w2", shared: "w1" },
      "/usr/local/bin/may-build": "test -e /tmp/may-build",
    };
    for (const [, name, text] of examples) {
      if (name === "fixed.ts") continue; // lists a machine that nobody has
      const here = Object.entries(names).reduce(
        (text, [from, to]) => text.replaceAll(from, to),
        text!,
      );
      writeFileSync(`${directory}/${name}`, here);
    }
    useOffload("head", runtime, ACQUAINTED);
    try {
      await meetMachines(runtime);
      const [derivation] = makeWork("head", "--inputs=2");
      const running = watch(start("head", ...buildCommand([derivation!])));
      await until(
        "it is refused",
        () => running.text().includes("others use all slots of 'w1'"),
      );
      writeFileSync(`${root("w1")}/tmp/may-build`, "");
      const result = await within("the build", running.ended);
      assertOffloaded(derivation!, result, ["w1"]);
      assert.not.match(result.stderr, "offload: warning");
    } finally {
      rmSync(directory, { recursive: true });
      rmSync(`${root("head")}/root/.ssh/known_hosts`);
      rmSync(`${root("w1")}/tmp/may-build`, { force: true });
    }
  });

  test("dns-sd uses what is pinned of what it finds", async () => {
    useMachines("head", [], () => "(list)");
    const address = (host: string) =>
      lab("list").split("\n").find((line) => line.startsWith(`${host} `))!
        .split(" ")[1]!;
    const hosts = ["w1", "w2"].map((host) => `${address(host)} ${host}.local\n`)
      .join("");
    const file = `${root("head")}/etc/hosts`;
    const before = readFileSync(file, "utf8");
    writeFileSync(file, before + hosts);
    writeFileSync(`${root("head")}/etc/avahi/hosts`, hosts);
    const pins = `w1.local ${hostKey("w1")}\n`;
    writeFileSync(`${root("head")}/tmp/known_hosts`, pins);
    const records = [`systems=${SYSTEM}`, "slots=3", "speed=1.5"];
    try {
      await whilePublished([
        ["w1", "one", ...records],
        ["w2", "two", ...records, "features=any"],
      ], () => {
        const knownHosts = "/tmp/known_hosts";
        const options = { knownHosts, overloadThreshold: 0 };
        usePlugins("head", runtime, { "dns-sd": options });
        const [derivation, result] = buildWork();
        assert.is(result.status, 0, result.stderr);
        assert.match(result.stderr, `offloading '${derivation}' to 'w1.local'`);
        const { stdout } = run(
          ...["head", "env"] as const,
          `OFFLOAD_USE=${JSON.stringify({ "dns-sd": options })}`,
          ...offloadCommand(runtime, "explain", derivation, "--json"),
        );
        const machines = JSON.parse(stdout) as Record<string, unknown>[];
        assert.equal(
          machines.map(({ machine, slots }) => [machine, slots]),
          [["w1.local:22", 3]],
        );
      });
    } finally {
      writeFileSync(file, before);
    }
  });

  test("a machine on demand is started, used and stopped", async () => {
    const pid = "/run/sshd-2222.pid";
    const login = "ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR w1";
    const fields = fieldsOf("w1", {
      port: 2222,
      // Not before it is let, which no answer may wait for.
      start: "until [ -e /tmp/switch ]; do sleep 0.1; done; " +
        `${login} /usr/sbin/sshd -p 2222 -o PidFile=${pid}`,
      stop: `${login} 'kill $(cat ${pid})'`,
      ...{ "boot-timeout": 60, "idle-time": 2 },
    });
    const list = JSON.stringify([fields]);
    writeFileSync(`${root("head")}/etc/guix/machines.json`, list);
    useMachines("head", [], () => "(list)");
    const plugins = { "json-machines": {} };
    const [derivation] = makeWork("head");
    const file = `${root("head")}/tmp/switch`;
    rmSync(file, { force: true });
    const { answer, stderr } = await ask(derivation!, runtime, plugins);
    assert.is(answer, "postpone");
    assert.match(stderr, "starting 'w1'...");
    const isOn = () => existsSync(root("w1") + pid);
    assert.not(isOn());
    writeFileSync(file, "");
    await until("it is started", isOn);
    usePlugins("head", runtime, plugins);
    const result = build("head", derivation!);
    assert.is(result.status, 0, result.stderr);
    assert.match(result.stderr, `offloading '${derivation}' to 'w1'`);
    await until("it is stopped", () => !isOn());
    const directory = `${root("head")}${STATE}/w1:2222`;
    const files = ["power", "keeper"].map((name) => `${directory}/${name}`);
    await until("it is off", () => !files.some((file) => existsSync(file)));
  });

  test("a machine that fails to start is told", async () => {
    const fields = fieldsOf("w1", {
      ...{ port: 2222, start: "echo no power; exit 1", stop: "echo stopped" },
    });
    const list = JSON.stringify([fields]);
    writeFileSync(`${root("head")}/etc/guix/machines.json`, list);
    useMachines("head", [], () => "(list)");
    const plugins = { "json-machines": {} };
    const [derivation] = makeWork("head");
    const first = await ask(derivation!, runtime, plugins);
    assert.is(first.answer, "postpone");
    const directory = `${root("head")}${STATE}/w1:2222`;
    await until(
      "it failed",
      () => /^failed/.test(readFileSync(`${directory}/power`, "utf8")),
    );
    assert.match(readFileSync(`${directory}/log`, "utf8"), /no power\n.*\nsto/);
    assert.is((await ask(derivation!, runtime, plugins)).answer, "decline");
    rmSync(directory, { recursive: true });
  });

  test.after(() => {
    useMachines("head", ["w1", "w2"]);
    useOffload("head", runtime);
  });
  test.run();
}
