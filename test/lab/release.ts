/**
 * A release, and hosts that install it as an administrator does: with one
 * runtime and no checkout.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  appendFileSync,
  copyFileSync,
  cpSync,
  existsSync,
  globSync,
  lstatSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:https";
import type { Server } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import * as assert from "uvu/assert";
import {
  CERTIFICATE,
  inHost,
  lab,
  ROOT,
  root,
  run,
  start,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

/** The runtimes' programs: each host gets a copy of one. */
export const PROGRAMS: Readonly<Record<Runtime, string>> = {
  node: `${ROOT}node_modules/node/bin/node`,
  deno: globSync(`${ROOT}node_modules/@deno/*/deno`)[0]!,
};

/** The version of Node that Guix 1.5 has. */
export const OLDEST_NODE = `${ROOT}node_modules/node-oldest/bin/node`;

export const LIBRARY = "/usr/local/lib/offload";
export const SHIM = `${LIBRARY}/guix`;

/** On the hosts, what is no file that an administrator would know. */
const NOT_COMPARED = ["dev", "gnu", "offload", "proc", "run", "sys", "tmp"]
  .concat("var/guix", "var/log", "root/release");

export const release = mkdtempSync(`${tmpdir()}/offload-release-`);
let server: Server;

/** Where the release is served; below /plain it is sent on elsewhere. */
export const served = { url: "", redirection: "" };

/** The hosts, and the account that guix-daemon runs as there. */
export const HOSTS = { fresh: "root", ufresh: "guix-daemon" } as const;

/** Makes what is installed, or all that is published, and serves it. */
export async function serveRelease(
  program: "bundle" | "release" = "bundle",
): Promise<void> {
  const pem = readFileSync(CERTIFICATE);
  server = createServer({ key: pem, cert: pem }, (request, response) => {
    const [, path] = /^\/plain(\/.*)$/.exec(request.url!) ?? [];
    if (path) {
      response.writeHead(302, { location: served.redirection + path }).end();
      return;
    }
    const file = release + request.url;
    if (!existsSync(file)) response.writeHead(404).end();
    else response.end(readFileSync(file));
  });
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve);
  });
  served.url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const env = { ...process.env, OFFLOAD_RUNTIME: PROGRAMS.node };
  const options = program === "release" ? ["--url", served.url] : [];
  const args = [...options, release];
  const made = spawnSync(`${ROOT}scripts/${program}`, args, { env });
  assert.is(made.status, 0, made.stderr.toString());
}

/** Ends that. */
export function endRelease(): void {
  server.close();
  rmSync(release, { recursive: true });
}

/** Leaves a host with one runtime and no checkout. */
export function makeFresh(host: string, runtime: Runtime | undefined): void {
  if (existsSync(`${root(host)}/offload/mod.ts`)) {
    inHost(host, "umount", "/offload");
  }
  for (const [name, program] of Object.entries(PROGRAMS)) {
    const file = `${root(host)}/usr/local/bin/${name}`;
    if (name !== runtime) rmSync(file, { force: true });
    else if (!existsSync(file)) copyFileSync(program, file);
  }
}

/** All of a host that installing could have changed: mode, owner, content. */
export function listing(host: string): Record<string, string> {
  const entries: Record<string, string> = {};
  const visit = (name: string) => {
    const file = `${root(host)}/${name}`;
    const { mode, uid, gid, size, mtimeMs } = lstatSync(file);
    const kind = mode & 0o170000;
    const isSystem = name.startsWith("usr/") && !name.startsWith("usr/local/");
    const content = kind === 0o120000
      ? readlinkSync(file)
      : kind !== 0o100000
      ? ""
      : isSystem || size > 8 << 20
      ? `${size} ${mtimeMs}`
      : createHash("sha256").update(readFileSync(file)).digest("hex");
    entries[name] = `${mode.toString(8)} ${uid}:${gid} ${content}`;
    if (kind !== 0o040000 || NOT_COMPARED.includes(name)) return;
    for (const child of readdirSync(file)) {
      visit(name === "" ? child : `${name}/${child}`);
    }
  };
  visit("");
  return entries;
}

/** What differs between two listings. */
export function changes(
  before: Record<string, string>,
  after: Record<string, string>,
): string[] {
  return [...new Set([...Object.keys(before), ...Object.keys(after)])]
    .filter((name) => before[name] !== after[name]).sort();
}

/** Runs the one line in a host, as a shell has it. */
export async function pipe(
  host: string,
  shell: string,
  options: string,
): Promise<Result> {
  copyFileSync(CERTIFICATE, `${root(host)}/tmp/server.pem`);
  const line = "export CURL_CA_BUNDLE=/tmp/server.pem; " +
    `curl -fsSL ${served.url}/install.sh | ${shell} -s -- --from ${served.url} ${options}`;
  // This process serves the files meanwhile.
  const running = watch(start(host, "sh", "-c", line));
  return await within("install.sh", running.ended, 120_000);
}

/** Runs install.sh of a copy of the release in a host. */
export function install(host: string, ...options: readonly string[]): Result {
  return run(host, "sh", "/root/release/install.sh", ...options);
}

/** Puts a copy of the release in a host. */
export function copyRelease(host: string): string {
  const directory = `${root(host)}/root/release`;
  rmSync(directory, { recursive: true, force: true });
  cpSync(release, directory, { recursive: true });
  return directory;
}

/** Changes the release in a host, as the next version would. */
export function nextVersion(directory: string): void {
  appendFileSync(`${directory}/offload.mjs`, "// the next version\n");
  const names = readFileSync(`${directory}/SHA256SUMS`, "utf8")
    .matchAll(/^\S+ {2}(.*)$/gm);
  const sums = [...names].map(([, name]) => {
    const content = readFileSync(`${directory}/${name}`);
    return `${createHash("sha256").update(content).digest("hex")}  ${name}\n`;
  });
  writeFileSync(`${directory}/SHA256SUMS`, sums.join(""));
}

/** Demands that a command failed with these words and changed nothing. */
export function assertRefused(
  host: string,
  before: Record<string, string>,
  result: Result,
  words: RegExp,
): void {
  assert.match(result.stderr, words);
  assert.match(result.stderr, /^offload: error: .+\nhint: .+$/m);
  assert.is(result.status, 1);
  assert.equal(changes(before, listing(host)), []);
}

/** Makes the database of a host's store know an item that was put there. */
export function register(host: string, item: string): void {
  writeFileSync(
    `${root(host)}/tmp/register.scm`,
    `(use-modules (guix build store-copy) (guix store database))
(with-database "/var/guix/db/db.sqlite" db
  (register-items db (list (store-info ${JSON.stringify(item)} #f '()))))`,
  );
  inHost(host, "guix", "repl", "/tmp/register.scm");
}

/** Has the store be writable for the daemon alone, as Guix's units do. */
export function restartDaemon(
  host: string,
  ...variables: readonly string[]
): void {
  if (host !== "ufresh") {
    lab("daemon", host, ...variables);
    return;
  }
  run(host, "umount", "/gnu/store");
  lab("daemon", host, ...variables);
  inHost(host, "mount", "--bind", "/gnu/store", "/gnu/store");
  inHost(host, "mount", "-o", "remount,bind,ro", "/gnu/store");
}
