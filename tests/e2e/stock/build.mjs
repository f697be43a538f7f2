// Templates built by E2B's own package for JavaScript; says each step that went as it must.
import assert from 'node:assert/strict'
import { mkdirSync, mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { BuildError, Sandbox, Template } from 'e2b'

const name = `built-${crypto.randomUUID().slice(0, 8)}`
const context = mkdtempSync(join(tmpdir(), 'context-'))
mkdirSync(join(context, 'site'))
writeFileSync(join(context, 'site/hello.txt'), 'hello\n')

function template(last) {
  return Template({ fileContextPath: context })
    .fromTemplate('base')
    .setEnvs({ COLOUR: 'sand' })
    .runCmd('echo $COLOUR >made')
    .copy('site', '/srv/app/')
    .runCmd(last)
    .setStartCmd('python3 -m http.server 8000 --directory /srv/app', 'curl -fs -o /dev/null http://localhost:8000/hello.txt')
}

const log = []
const shape = { cpuCount: 1, memoryMB: 512 }
const options = { ...shape, onBuildLogs: (entry) => log.push(entry.message) }
const info = await Template.build(template('true'), name, { ...options, tags: ['default', 'v1'] })
assert.equal(info.templateId, name)
assert.ok(log.some((each) => each.includes('echo $COLOUR')), log.join('\n'))
console.log('builds')

assert.equal(await Template.exists(name), true)
assert.equal(await Template.exists(`${name}-not`), false)
console.log('exists')

const sandbox = await Sandbox.create(`${name}:v1`, { timeoutMs: 60_000 })
const said = await sandbox.commands.run('cat made; curl -fs localhost:8000/hello.txt')
assert.equal(said.stdout, 'sand\nhello\n')
await sandbox.kill()
console.log('starts')

const given = await Template.assignTags(`${name}:v1`, 'stable')
const tags = await Template.getTags(name)
assert.deepEqual(tags.map((each) => each.tag).sort(), ['default', 'stable', 'v1'])
assert.ok(tags.every((each) => each.buildId === given.buildId))
await Template.removeTags(name, ['stable'])
assert.equal((await Template.getTags(name)).length, 2)
console.log('tags')

await assert.rejects(Template.build(template('exit 7'), name, options), (error) => error instanceof BuildError && error.message.includes('7'))
console.log('failing')
process.exit(0)
