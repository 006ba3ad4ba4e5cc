/** Servers and accounts that are set up in odd ways, and clients that stop. */

import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure, endKept, startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  outputsOf,
  root,
  run,
  RUNTIMES,
  start,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

const MEBIBYTE = 2 ** 20;
const BULK = ["--inputs=1", `--input-size=${6 * MEBIBYTE}`];

/** Makes work, builds it through w1, and gives the log. */
function buildWork(...options: string[]): [derivation: string, Result] {
  const [derivation] = makeWork("head", ...options);
  return [derivation!, build("head", derivation!)];
}

/** Notes the calls of `guix` on w1, and the daemon that each is for. */
const SPY = `#!/bin/sh
echo "$1 $2 $GUIX_DAEMON_SOCKET" >>/tmp/guix-calls
exec /usr/bin/guix "$@"
`;

/** What `guix` was called for on w1 while `work` was done. */
function callsDuring(work: () => void): string {
  const file = `${root("w1")}/tmp/guix-calls`;
  rmSync(file, { force: true });
  const spy = "/usr/local/bin/guix";
  writeFileSync(root("w1") + spy, SPY, { mode: 0o755 });
  try {
    work();
    return readFileSync(file, "utf8");
  } finally {
    inHost("w1", "rm", "-f", spy);
  }
}

/** Does work while w1's sshd has these options. */
function withSshd(options: readonly string[], work: () => void): void {
  lab("sshd", "w1", ...options.flatMap((option) => ["-o", option]));
  endKept();
  try {
    work();
  } finally {
    lab("sshd", "w1");
  }
}

/** Start-up files, and the shells that read them where a command is run. */
const START_UP_FILES: Readonly<Record<string, string>> = {
  bash: ".bashrc",
  fish: ".config/fish/config.fish",
  tcsh: ".tcshrc",
  zsh: ".zshenv",
};

/** Does work while root's shell on w1 is this one and starts with that. */
function withStartUp(shell: string, text: string, work: () => void): void {
  const file = `/root/${START_UP_FILES[shell]}`;
  inHost("w1", "mkdir", "-p", file.replace(/\/[^/]+$/, ""));
  inHost("w1", "usermod", "--shell", `/usr/bin/${shell}`, "root");
  writeFileSync(root("w1") + file, text);
  endKept();
  try {
    work();
  } finally {
    rmSync(root("w1") + file);
    inHost("w1", "usermod", "--shell", "/bin/bash", "root");
  }
}

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`accounts under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
  });
  test.before.each(() => {
    useMachines("head", ["w1"]);
    endKept();
  });

  /** Builds through w1 with bulk; returns its log. */
  function buildBulk(...options: string[]): string {
    const [derivation, result] = buildWork(...BULK, ...options);
    assertOffloaded(derivation, result, ["w1"]);
    return result.stderr;
  }

  const single = ["MaxSessions=1", "AllowStreamLocalForwarding=no"];
  test("one session is enough, for a build that is quiet as well", () => {
    const quick = "OFFLOAD_KEEPALIVE_TIMEOUT=1";
    useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1", quick);
    try {
      withSshd(single, () => buildBulk("--seconds=3"));
    } finally {
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
    }
  });

  test("one command at a time is enough for bulk", () => {
    const size = `--input-size=${34 * MEBIBYTE}`; // the way is measured
    withSshd(["MaxSessions=1"], () => {
      const calls = callsDuring(() => buildBulk("--inputs=1", size));
      assert.match(calls, "archive --import");
    });
  });

  const noise = 'echo hello\nprintf "%s" "no line"\n';
  test("what a shell prints when it starts is skipped", () => {
    for (const shell of Object.keys(START_UP_FILES)) {
      withStartUp(shell, noise, () => {
        const tested = run("head", ...offloadCommand(runtime, "test"));
        assert.match(tested.stdout, /^w1:22\tok\t8\/8\t/m, shell);
      });
    }
    withStartUp("bash", noise, () => {
      const calls = callsDuring(() => buildBulk());
      assert.match(calls, "archive --import");
      withSshd(single, () => buildBulk());
    });
  });

  test("what prints without end is named", () => {
    withStartUp("bash", "while :; do echo hello; done\n", () => {
      const tested = run("head", ...offloadCommand(runtime, "test"));
      const named = "the account's shell start-up files print too much";
      assert.match(tested.stderr, `w1:22: guix: warning: failed to run`);
      assert.match(tested.stderr, named);
      assert.match(buildBulk(), named);
      withSshd(single, () => {
        const { status, stderr } = run(
          "head",
          ...offloadCommand(runtime, "test"),
        );
        assert.is(status, 1, stderr);
        assert.match(stderr, RegExp(`^w1:22: daemon: failed: .*${named}`, "m"));
      });
    });
  });

  const SOCKET = "/var/guix/daemon-socket/socket";
  const OTHER = "/var/guix/daemon-socket/other";

  /** Does work while w1's daemon listens elsewhere. */
  async function withOtherSocket(work: () => unknown): Promise<void> {
    inHost("w1", "mv", SOCKET, OTHER);
    endKept();
    try {
      await work();
    } finally {
      inHost("w1", "mv", OTHER, SOCKET);
    }
  }

  test("a daemon at another socket gets the bulk as well", () =>
    withOtherSocket(() => {
      useMachines(
        ...["head", ["w1"]] as const,
        (text) => text.replace('(name "w1")', `$& (daemon-socket "${OTHER}")`),
      );
      const calls = callsDuring(() => buildBulk());
      assert.match(calls, `archive --import ${OTHER}`);
      const archive = "OFFLOAD_TRANSPORT=archive-command";
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1", archive);
      buildBulk();
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
    }));

  test("the login's environment may name the daemon", () =>
    withOtherSocket(() => {
      const file = `${root("w1")}/root/.ssh/environment`;
      writeFileSync(file, `GUIX_DAEMON_SOCKET=unix://${OTHER}\n`);
      try {
        withSshd(["PermitUserEnvironment=yes"], () => {
          const tested = run("head", ...offloadCommand(runtime, "test"));
          assert.match(tested.stdout, /^w1:22\tok\t8\/8\t/m);
          buildBulk();
        });
        withSshd(["PermitUserEnvironment=yes", single[1]!], () => buildBulk());
      } finally {
        rmSync(file);
      }
    }));

  const LINES = 60_000;

  /** The numbers of the lines that the builder printed. */
  const printed = (text: string) =>
    [...text.matchAll(/^line (\d+) of/gm)].map(([, number]) => Number(number));

  test("a client that stops holds up its log alone", async () => {
    const alive = ["ClientAliveInterval=1", "ClientAliveCountMax=3"];
    lab("sshd", "w1", ...alive.flatMap((option) => ["-o", option]));
    try {
      const [derivation] = makeWork("head", `--log-lines=${LINES}`);
      const command = buildCommand([derivation!]).join(" ");
      // What stops with it must not be what the test waits for.
      const script = `${command} & echo $! >/tmp/client; wait $!`;
      const client = watch(start("head", "sh", "-c", script));
      const kill = (signal: string) =>
        inHost("head", "sh", "-c", `kill -${signal} $(cat /tmp/client)`);
      await until("a line", () => client.text().includes("line 100 of"));
      kill("STOP");
      const stopped = Date.now();
      // A connection that is not answered on is cut after 3 s.
      await until("sshd's patience", () => Date.now() - stopped > 5000);
      kill("CONT");
      const result = await within("the build", client.ended);
      assertOffloaded(derivation!, result, ["w1"]);
      const { stderr } = result;
      assert.is(stderr.match(/^offloading '/gm)?.length, 1);
      // The hook's own messages may come in the middle of a line.
      const messages = /(retrieving \d|done with offloaded).*\n/g;
      const numbers = printed(stderr.replace(messages, ""));
      assert.is(numbers.length, LINES);
      assert.ok(numbers.every((number, index) => number === index + 1));
    } finally {
      lab("sshd", "w1");
    }
  });

  test("a hook ends when all of its log is written", async () => {
    const lines = 10_000; // more than a pipe holds
    const [derivation] = makeWork("head", `--log-lines=${lines}`);
    const log = "/tmp/build-log-slow";
    inHost("head", "sh", "-c", `rm -f ${log}; mkfifo ${log}`);
    const script = `exec 4<>${log}; touch ${log}.open; read go; exec cat <&4`;
    const reader = watch(start("head", "sh", "-c", script));
    await until("a reader", () => existsSync(`${root("head")}${log}.open`));
    const hook = startHook("head", { runtime, log });
    assert.is(await hook.ask(derivation!), "accept");
    hook.work(
      closure("head", derivation!),
      Object.values(outputsOf("head", derivation!)),
    );
    await until(
      "the end of the build",
      () => hook.text().includes("done with"),
    );
    reader.child.stdin!.write("go\n");
    assert.is((await within("the hook", hook.ended)).status, 0);
    await until("all", () => printed(reader.text()).length === lines);
    reader.child.kill();
  });

  test("a server that wants more than the key is told as that", () => {
    const more = "AuthenticationMethods=publickey,keyboard-interactive";
    withSshd([more, "KbdInteractiveAuthentication=yes"], () => {
      const { stdout, stderr } = run(
        "head",
        ...offloadCommand(runtime, "test"),
      );
      assert.match(
        stderr,
        "'w1' accepted the SSH key and wants 'keyboard-interactive' as well",
      );
      assert.match(stdout, "'AuthenticationMethods publickey'");
      assert.not.match(stdout + stderr, "ssh-copy-id");
    });
  });

  for (const algorithm of ["mlkem768x25519-sha256", "sntrup761x25519-sha512"]) {
    test(`a server that knows only ${algorithm} is reached by ssh`, () => {
      withSshd([`KexAlgorithms=${algorithm}`], () => {
        const tested = run("head", ...offloadCommand(runtime, "test"));
        assert.match(tested.stderr, "no common key exchange algorithm");
        assert.match(tested.stdout, `set 'connect' to "openssh"`);
        useMachines("head", ["w1"]);
        const connect = "OFFLOAD_CONNECT=openssh";
        useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1", connect);
        const [derivation, result] = buildWork();
        useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
        assertOffloaded(derivation, result, ["w1"]);
      });
    });
  }

  for (const wantsLocal of [true, false]) {
    const answer = wantsLocal ? "decline" : "postpone";
    test(`without ssh, what is to connect by it gets a ${answer}`, async () => {
      const [derivation] = makeWork("head");
      useMachines("head", ["w1"]);
      inHost("head", "mv", "/usr/bin/ssh", "/usr/bin/ssh.away");
      try {
        const variables = ["OFFLOAD_CONNECT=openssh"];
        const hook = startHook("head", { runtime, wantsLocal, variables });
        assert.is(await hook.ask(derivation!), answer);
        assert.is(await hook.ask(derivation!), answer);
        hook.close();
        await within("the hook", hook.ended);
        const told = hook.text().match(/there is no program 'ssh' here/g);
        assert.is(told?.length, 1, hook.text());
        assert.match(hook.text(), "hint: install OpenSSH's client");
      } finally {
        inHost("head", "mv", "/usr/bin/ssh.away", "/usr/bin/ssh");
      }
    });
  }

  test.run();
}
