// The life of a sandbox by E2B's own package for JavaScript; says each step that went as it must.
import assert from 'node:assert/strict'
import { CommandExitError, Sandbox } from 'e2b'

const labels = { colour: 'sand & sea', run: crypto.randomUUID() }
const sandbox = await Sandbox.create({ timeoutMs: 240_000, metadata: labels, envs: { GREETING: 'hi' } })
assert.equal((await sandbox.getInfo()).metadata.colour, labels.colour)
console.log('create')

const said = await sandbox.commands.run('echo "$GREETING $(id -un) $PWD"')
assert.equal(said.stdout, 'hi user /home/user\n')
await assert.rejects(
  sandbox.commands.run('exit 3'),
  (error) => error instanceof CommandExitError && error.exitCode === 3,
)
console.log('run')

const waiting = await sandbox.commands.run('read x; echo got $x', { background: true, stdin: true })
await sandbox.commands.sendStdin(waiting.pid, 'word\n')
assert.equal((await waiting.wait()).stdout, 'got word\n')
console.log('background')

let heard = ''
const decoder = new TextDecoder()
const terminal = await sandbox.pty.create({ cols: 90, rows: 30, onData: (data) => { heard += decoder.decode(data) } })
await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('stty size; echo $((6*7)); exit\n'))
await terminal.wait()
assert.match(heard, /30 90[\s\S]*42/)
console.log('pty')

await sandbox.files.write('a/text.txt', 'words')
assert.equal(await sandbox.files.read('a/text.txt'), 'words')
const blob = new Uint8Array(1_000_000).map((_, index) => index % 251)
await sandbox.files.write('blob', blob.buffer)
assert.deepEqual(await sandbox.files.read('blob', { format: 'bytes' }), blob)
assert.deepEqual((await sandbox.files.list('a')).map((each) => each.name), ['text.txt'])
console.log('files')

const events = []
await sandbox.files.makeDir('watched')
const watching = await sandbox.files.watchDir('watched', (event) => { events.push(event) })
await sandbox.files.write('watched/one', '1')
const end = Date.now() + 30_000
while (events.length < 3 && Date.now() < end) await new Promise((next) => setTimeout(next, 50))
await watching.stop()
assert.deepEqual(new Set(events.map((each) => each.name)), new Set(['one']))
console.log('watch')

await sandbox.commands.run('echo kept > /dev/shm/memory')
await sandbox.pause()
const woken = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 240_000 })
assert.equal((await woken.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
console.log('pause')

const paginator = Sandbox.list({ limit: 1, query: { metadata: labels } })
const found = []
while (paginator.hasNext) found.push(...(await paginator.nextItems()))
assert.deepEqual(found.map((each) => each.sandboxId), [sandbox.sandboxId])
console.log('paging')

const made = await woken.createSnapshot()
const other = await Sandbox.create(made.snapshotId, { timeoutMs: 60_000 })
assert.equal((await other.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), true)
await other.kill()
console.log('snapshot')

assert.equal(await sandbox.kill(), true)
assert.equal(await sandbox.kill(), false)
assert.equal(await sandbox.isRunning(), false)
console.log('kill')
