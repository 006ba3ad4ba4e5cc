/**
 * Archives made by hand, and what becomes of them.
 *
 * @module
 */

import type { Buffer } from "node:buffer";
import { mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { writeFileSync } from "node:fs";
import * as assert from "uvu/assert";
import { ByteReader, encode, restoreNar } from "../mod.ts";
import type { WireValue } from "../mod.ts";
import { chunks, rejects, run, settled, withDirectory } from "./helpers.ts";

/** Text, or bytes that may be no UTF-8. */
export type Bytes = string | Uint8Array;

/** The tokens of a file, link or directory. */
export type Node = readonly WireValue[];

/** A regular file. */
export function file(contents: Bytes = "", ...executable: string[]): Node {
  return ["(", "type", "regular", ...executable, "contents", contents, ")"];
}

/** An executable file. */
export function program(contents: Bytes = ""): Node {
  return file(contents, "executable", "");
}

/** A symbolic link. */
export function link(target: Bytes): Node {
  return ["(", "type", "symlink", "target", target, ")"];
}

/** A directory with these entries, in this order. */
export function directory(
  ...entries: readonly (readonly [Bytes, Node])[]
): Node {
  const tokens = entries.flatMap(([name, node]) => //
  ["entry", "(", "name", name, "node", ...node, ")"]);
  return ["(", "type", "directory", ...tokens, ")"];
}

/** The archive of a file, link or directory. */
export function nar(node: Node): Buffer {
  return encode("nix-archive-1", ...node);
}

/** Packs a file as a nar.  In Perl file names are bytes, in Deno text. */
const PACK = String.raw`
sub text { map { pack("Q<", length) . $_ . "\0" x (-length() % 8) } @_ }
sub node {
    my $file = shift;
    return text(qw{( type symlink target}, readlink $file, ")") if -l $file;
    return text(qw{( type directory}), entries($file), text(")") if -d $file;
    open my $handle, "<:raw", $file or die "$file: $!";
    my $executable = (lstat $file)[2] & 0111;
    text(qw{( type regular}, $executable ? ("executable", "") : (),
         "contents", join("", <$handle>), ")")
}
sub entries {
    my $directory = shift;
    opendir my $handle, $directory or die "$directory: $!";
    map { text(qw{entry ( name}, $_, "node"), node("$directory/$_"), text(")") }
        sort grep { !/^\.\.?$/ } readdir $handle
}
binmode STDOUT;
print text("nix-archive-1"), node($ARGV[0])`;

/** The archive of what is on the disk. */
export async function pack(file: string): Promise<Buffer> {
  const { code, stdout, stderr } = await run("perl", ["-e", PACK, file]);
  assert.is(code, 0, stderr);
  return stdout;
}

/** Restores an archive, given in parts. */
export async function restore(
  target: string,
  ...parts: readonly Uint8Array[]
): Promise<void> {
  const reader = new ByteReader(chunks(...parts), "archive");
  await settled(restoreNar(reader, target));
  assert.not.ok(await reader.more());
}

/** Checks that an archive is restored byte for byte. */
export function restores(
  archive: Buffer,
  ...parts: Uint8Array[]
): Promise<void> {
  return withDirectory(async (directory) => {
    const target = `${directory}/target`;
    await restore(target, ...parts.length > 0 ? parts : [archive]);
    assert.is(
      (await pack(target)).toString("latin1"),
      archive.toString("latin1"),
    );
    assert.equal(readdirSync(directory), ["target"]);
  });
}

/** Checks that an archive is refused and nothing is written but `target`. */
export function refuses(archive: Buffer, pattern: RegExp): Promise<void> {
  return withDirectory(async (directory) => {
    mkdirSync(`${directory}/a/b`, { recursive: true });
    writeFileSync(`${directory}/a/outside`, "as before");
    await rejects(restore(`${directory}/a/b/target`, archive), pattern);
    rmSync(`${directory}/a/b/target`, { recursive: true, force: true });
    assert.equal(readdirSync(`${directory}/a/b`), []);
    assert.equal(readdirSync(`${directory}/a`), ["b", "outside"]);
    assert.is(readFileSync(`${directory}/a/outside`, "utf8"), "as before");
    assert.equal(readdirSync(directory), ["a"]);
  });
}
