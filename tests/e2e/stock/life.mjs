// The life of a sandbox by E2B's own package for JavaScript; says each step that went as it must.
import assert from 'node:assert/strict'
import { CommandExitError, Sandbox } from 'e2b'

// What `look` finds, as soon as it finds something.
async function until(look, what) {
  const end = Date.now() + 30_000
  for (;;) {
    const found = await look()
    if (found) return found
    assert.ok(Date.now() < end, `never came: ${what}`)
    await new Promise((next) => setTimeout(next, 50))
  }
}

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
const counting = await sandbox.commands.run('wc -c', { background: true, stdin: true })
await sandbox.commands.sendStdin(counting.pid, '12345')
await sandbox.commands.closeStdin(counting.pid)
assert.equal((await counting.wait()).stdout.trim(), '5')
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

const form = new FormData()
form.append('file', new Blob(['signed']), 'signed.txt')
const sent = await fetch(await sandbox.uploadUrl('signed.txt'), { method: 'POST', body: form })
assert.equal(sent.status, 200, await sent.text())
const got = await fetch(await sandbox.downloadUrl('signed.txt', { useSignatureExpiration: 60_000 }))
assert.equal(await got.text(), 'signed')
console.log('signed')

const events = []
await sandbox.files.makeDir('watched')
const watching = await sandbox.files.watchDir('watched', (event) => { events.push(event) })
await sandbox.files.write('watched/one', '1')
await until(() => events.length >= 3, 'three events')
await watching.stop()
assert.deepEqual(new Set(events.map((each) => each.name)), new Set(['one']))
console.log('watch')

await sandbox.commands.run('echo kept > /dev/shm/memory')
await sandbox.pause()
const woken = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 240_000 })
assert.equal((await woken.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
console.log('pause')

const lifecycle = { onTimeout: 'pause', autoResume: true }
const dozing = await Sandbox.create({ timeoutMs: 240_000, lifecycle })
await dozing.commands.run('echo kept > /dev/shm/memory')
await dozing.pause()
assert.equal((await dozing.getInfo()).state, 'paused')
assert.equal((await dozing.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
assert.equal((await dozing.getInfo()).state, 'running')
await dozing.kill()
console.log('wake')

const children = await woken.fork({ count: 2, timeoutMs: 120_000 })
assert.equal(children.length, 2)
for (const child of children) {
  assert.ok(child instanceof Sandbox, String(child))
  assert.equal((await child.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
  await child.kill()
}
assert.equal((await woken.commands.run('echo on')).stdout, 'on\n')
console.log('fork')

const made = await woken.createSnapshot()
const other = await Sandbox.create(made.snapshotId, { timeoutMs: 60_000 })
assert.equal((await other.commands.run('cat /dev/shm/memory')).stdout, 'kept\n')
assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), true)
await other.kill()
console.log('snapshot')

const paginator = Sandbox.list({ limit: 1, query: { metadata: labels } })
const found = []
while (paginator.hasNext) found.push(...(await paginator.nextItems()))
assert.deepEqual(found.map((each) => each.sandboxId), [sandbox.sandboxId])
console.log('paging')

// The guest tells its memory some time after it was created; there are no points before that.
const [point] = await until(async () => {
  const points = await woken.getMetrics()
  return points.length > 0 && points
}, 'metrics')
assert.ok(point.memUsed > 0, JSON.stringify(point))
assert.equal(point.cpuCount, 1)
assert.equal(point.memTotal, 512 * 1024 * 1024)
assert.ok(point.memUsed < point.memTotal && point.diskUsed > 0 && point.diskUsed < point.diskTotal, JSON.stringify(point))
console.log('metrics')

assert.equal(await sandbox.kill(), true)
assert.equal(await sandbox.kill(), false)
assert.equal(await sandbox.isRunning(), false)
console.log('kill')
