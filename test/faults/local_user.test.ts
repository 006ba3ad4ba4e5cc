/**
 * A local user without rights, and guix-daemon's account against root: what
 * either does to files, locks, names and processes gives it no right and stops
 * nobody's build.
 */

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { FCNTL } from "../helpers.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  inHost,
  makeWork,
  OBSERVATIONS,
  offloadCommand,
  root,
  run,
  RUNTIMES,
  start,
  STATE,
  until,
  up,
  useMachines,
  useOffload,
  useReference,
  watch,
} from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";

/** The masters, and the account that guix-daemon runs as there. */
const MASTERS = { head: "root", uhead: "guix-daemon" } as const;

type Master = keyof typeof MASTERS;

/** Locks for reading those files that it may open. */
const LOCK = `${FCNTL}
$| = 1;
my @files;
for my $name (@ARGV) {
  open my $file, "<", $name or next;
  push @files, $file if lock_file $file, F_RDLCK;
}
print "locked ", scalar @files, "\\n";
<STDIN>`;

for (const runtime of RUNTIMES) {
  for (const master of Object.keys(MASTERS) as Master[]) {
    suiteUnder(runtime, master);
  }
}

/** Runs a shell script as an account of a host. */
function as(account: string, host: string, script: string) {
  return run(host, "su", "-s", "/bin/sh", "-c", script, account);
}

/** Does what must work as an account. */
function must(account: string, host: string, script: string): void {
  const { status, stderr } = as(account, host, script);
  assert.is(status, 0, stderr);
}

function suiteUnder(runtime: Runtime, master: Master): void {
  const account = MASTERS[master];
  const test = suite(`a local user, ${account} as daemon, under ${runtime}`);

  const offload = (...args: string[]) =>
    run(master, ...offloadCommand(runtime, ...args));
  /** A file of the master, seen from here. */
  const there = (file: string) => root(master) + file;
  const owner = (file: string) =>
    inHost(master, "stat", "-c", "%U", file).trim();

  test.before(() => {
    up("head:master", "uhead:master:unprivileged", "w1");
    useOffload(master, runtime, "OFFLOAD_ATTEMPTS=1");
    inHost(master, "rm", "-rf", STATE, "/run/offload");
  });
  test.before.each(() => useMachines(master, ["w1"]));

  function buildOne(): void {
    const [derivation] = makeWork(master);
    assertOffloaded(derivation!, build(master, derivation!), ["w1"]);
  }

  test("what root's commands make is the daemon's", () => {
    inHost(master, "rm", "-rf", STATE);
    const { status, stderr } = offload("status");
    assert.is(status, 0, stderr);
    assert.is(owner(STATE), account);
    assert.is(owner(OBSERVATIONS), account);
    buildOne();
  });

  /** Starts what holds locks on files as that user, and ends with its input. */
  async function lockAs(user: string, files: readonly string[]) {
    writeFileSync(there("/tmp/lock.pl"), LOCK);
    const perl = `perl /tmp/lock.pl ${files.join(" ")}`;
    const holder = watch(
      start(master, "su", "-s", "/bin/sh", "-c", perl, user),
    );
    await until("the locks", () => /^locked \d+$/m.test(holder.text()));
    const locked = Number(/^locked (\d+)$/m.exec(holder.text())![1]);
    return {
      locked,
      async end() {
        holder.child.stdin!.end();
        await holder.ended;
      },
    };
  }

  test("a user gets no lock on what hooks share", async () => {
    buildOne();
    const slots = Array.from({ length: 4 }, (_, i) => `${STATE}/w1:22/${i}`);
    const files = [
      ...slots,
      OBSERVATIONS,
      `${OBSERVATIONS}-shm`,
      `${OBSERVATIONS}-wal`,
    ];
    const script = `cd ${STATE} && chmod 755 . w1:22 && touch ${slots[0]} ` +
      `${OBSERVATIONS} && chmod 644 ${slots[0]} ${OBSERVATIONS}`;
    // As earlier versions left it. A process that stays looks at what is shared
    // now and then, and puts that right.
    let before = 0;
    for (let tries = 0; tries < 5 && before < 2; tries++) {
      must(account, master, script);
      const holder = await lockAs("nobody", files);
      await holder.end();
      before = holder.locked;
    }
    assert.ok(before >= 2, "the test can lock what is open to all");
    buildOne();
    const holder = await lockAs("nobody", files);
    assert.is(holder.locked, 0);
    buildOne();
    await holder.end();
    const others = ["-path", "*/*-cache*", "-o", "-perm", "/077", "-print"];
    const open = inHost(master, "find", STATE, ...others);
    assert.is(open, "");
    const owners = inHost(master, "find", STATE, "!", "-user", account);
    assert.is(owners, "");
  });

  test("guix offload works with what is its owner's alone", () => {
    useReference(master);
    try {
      buildOne();
    } finally {
      useOffload(master, runtime, "OFFLOAD_ATTEMPTS=1");
    }
  });

  test("a user is told that the slots can't be seen", () => {
    buildOne();
    const command = offloadCommand(runtime, "status").join(" ");
    const { stderr } = as("nobody", master, `HOME=/tmp ${command}`);
    assert.match(stderr, `all slots look free, for '${STATE}' can't be seen`);
  });

  test("a user can neither stop a hook nor look into it", async () => {
    const [derivation] = makeWork(master, "--seconds=2");
    const building = watch(start(master, ...buildCommand([derivation!])));
    await until("the build", () => /^building work$/m.test(building.text()));
    const pids = inHost(master, "pgrep", "-f", "^[^ ]*(node|deno) .*mod[.]ts")
      .trim().split("\n");
    for (const pid of pids) {
      for (
        const script of [
          `kill -KILL ${pid}`,
          `cat /proc/${pid}/environ`,
          `cat /proc/${pid}/mem`,
          `ls /proc/${pid}/fd/`,
          `: </proc/${pid}/fd/0`,
        ]
      ) assert.is.not(as("nobody", master, script).status, 0, script);
    }
    assertOffloaded(derivation!, await building.ended, ["w1"]);
  });

  test("names that a user took before are none that a hook takes", () => {
    inHost(master, "rm", "-rf", STATE);
    const uid = inHost(master, "id", "-u", account).trim();
    must(
      "nobody",
      master,
      `for name in offload offload-${uid} ${uid} run; do
        for place in /tmp /dev/shm /var/tmp; do
          mkdir -m 777 $place/guix-$name && ln -s /etc/evil $place/guix-$name/w1:22
        done
      done`,
    );
    try {
      buildOne();
      // The daemon may have mounts of its own.
      const mount = (script: string) =>
        inHost(
          ...[master, "sh", "-euc"],
          `there="nsenter -t $(cat /run/guix-daemon.pid) -m"; ${script}`,
        );
      mount(`$there mount --bind ${STATE} ${STATE}
        $there mount -o remount,bind,ro ${STATE}`);
      try {
        buildOne();
      } finally {
        mount(`$there umount -l ${STATE}`);
      }
      assert.not(existsSync(there("/etc/evil")));
      const taken = "/tmp/guix-* /dev/shm/guix-* /var/tmp/guix-*";
      const found = inHost(
        ...[master, "sh", "-c", `find ${taken} -user ${account} -type f`],
      );
      assert.match(found, /^\/dev\/shm\/guix-offload-\w{6}\/w1:22\/0$/m);
      assert.not.match(found, /guix-(offload|offload-\d+|\d+|run)\//);
    } finally {
      const taken = "/tmp/guix-* /dev/shm/guix-* /var/tmp/guix-*";
      inHost(master, "sh", "-c", `rm -rf ${taken}`);
    }
  });

  if (account !== "root") {
    /** Lets the account lead root by a link; what it leads to stays away. */
    const lead = (script: string) => {
      inHost(master, "rm", "-rf", STATE, "/etc/evil.conf", "/etc/evil");
      must(account, master, script);
      const { status, stderr } = offload("status");
      assert.is(status, 0, stderr);
      assert.not(existsSync(there("/etc/evil.conf")), script);
      assert.not(existsSync(there("/etc/evil")), script);
    };

    test("root is not led by links in the state", () => {
      try {
        const links = ["", "-wal", "-shm", "-journal"].map((suffix) =>
          `ln -s /etc/evil.conf ${OBSERVATIONS}${suffix}`
        );
        lead([`mkdir -p ${STATE}`, ...links].join(" && "));
        lead(`ln -s /etc/evil ${STATE}`);
        // What runtimes keep compiled would be run.
        const caches = ["/tmp/node-cache", "/tmp/deno-cache"];
        inHost(master, "rm", "-rf", ...caches);
        lead(`ln -s /tmp ${STATE}`);
        caches.forEach((it) => assert.not(existsSync(there(it)), it));
      } finally {
        inHost(master, "rm", "-rf", STATE);
      }
      buildOne();
    });

    test("root's machines are started and stopped as the daemon", () => {
      const plugins = there("/etc/guix/offload");
      const machine = { name: "w1", systems: ["x86_64-linux"], user: "root" };
      const demand = {
        start: "id -un >/tmp/started",
        stop: "true",
        "private-key": "/root/.ssh/id_ed25519",
        "host-key": inHost("w1", "cat", "/etc/ssh/ssh_host_ed25519_key.pub")
          .trim(),
      };
      inHost(master, "mkdir", "-p", "/etc/guix/offload");
      const list = JSON.stringify([{ ...machine, ...demand }]);
      writeFileSync(`${plugins}/list.json`, list);
      const use = { command: { command: "cat /etc/guix/offload/list.json" } };
      writeFileSync(`${plugins}/settings.json`, JSON.stringify({ use }));
      inHost(master, "chown", "-R", "root:root", "/etc/guix/offload");
      useMachines(master, ["w1"], () => "(list)");
      try {
        must(
          account,
          master,
          `mkdir -p ${STATE}/w1:22 && cd ${STATE}/w1:22 && echo up 1 >power ` +
            `&& ln -s /etc/evil.conf log`,
        );
        // What it lists for root is not what the daemon's account kept.
        const { stdout, stderr } = offload("machines", "--json");
        assert.match(stdout, '"w1"', stderr);
        assert.ok(existsSync(there("/run/offload/programs-0")), stderr);
        const [derivation] = makeWork(master);
        offload("explain", derivation!);
        assert.not(existsSync(there("/etc/evil.conf")));
      } finally {
        inHost(master, "rm", "-rf", STATE, "/etc/guix/offload");
      }
    });

    test("builds go on where the state is another account's", () => {
      buildOne();
      inHost(master, "chown", "-R", "root:root", STATE);
      try {
        const [derivation] = makeWork(master);
        const result = build(master, derivation!);
        assertOffloaded(derivation!, result, ["w1"]);
        assert.match(
          result.stderr,
          /warning: failed to lock a build slot in .* in memory instead/,
        );
        assert.match(result.stderr, "guix-daemon runs as must own it");
      } finally {
        inHost(master, "rm", "-rf", STATE);
      }
    });

    test("root is not led by a link to what it is to replace", () => {
      const acl = "/etc/guix/acl";
      const secret = "/etc/secret";
      writeFileSync(there(secret), "(acl)\n");
      must(account, master, `mv ${acl} ${acl}.old && ln -s ${secret} ${acl}`);
      try {
        const key = "/etc/ssh/ssh_host_ed25519_key.pub";
        const [, fingerprint] = inHost("w1", "ssh-keygen", "-lf", key).split(
          " ",
        );
        const options = ["--fingerprint", fingerprint!];
        const { status, stderr } = offload("trust", "root@w1", ...options);
        assert.is.not(status, 0, stderr);
        assert.match(stderr, `failed to replace '${acl}': permission denied`);
        assert.is(readFileSync(there(secret), "utf8"), "(acl)\n");
      } finally {
        inHost(master, "rm", "-f", secret, acl);
        inHost(master, "mv", `${acl}.old`, acl);
      }
    });

    test("root believes nothing that is kept for machine files", () => {
      const program = `(use-modules (ice-9 match))
        (match '("honest")
          ((name) (list (build-machine (name name) (user "root")
            (systems '("x86_64-linux")) (host-key "ssh-ed25519 AAAA")))))`;
      useMachines(master, ["w1"], () => program);
      const list = () => offload("machines", "--json").stdout;
      must(account, master, `mkdir -p ${STATE}`);
      assert.match(list(), "honest");
      // The account's own hook keeps what root must not read.
      const kept = `${STATE}/guile-machines.json`;
      const own = there("/run/offload/guile-machines.json");
      const forged = readFileSync(own, "utf8").replaceAll("honest", "forged");
      assert.match(forged, "forged");
      writeFileSync(there(kept), forged);
      inHost(master, "chown", account, kept);
      assert.match(list(), "honest");
      assert.not.match(list(), "forged");
    });
  }

  test.run();
}
