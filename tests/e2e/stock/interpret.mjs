// Code run by E2B's own package for JavaScript; says each step that went as it must.
import assert from 'node:assert/strict'
import { Sandbox } from '@e2b/code-interpreter'

const sandbox = await Sandbox.create({ timeoutMs: 240_000 })
await sandbox.runCode('x = 20')
const sum = await sandbox.runCode("print('said')\nx + 1")
assert.equal(sum.text, '21')
assert.deepEqual(sum.logs.stdout, ['said\n'])
console.log('state')

const plot = await sandbox.runCode(`
import matplotlib.pyplot as plt
plt.bar(["a", "b"], [1, 2])
plt.title("grains")
plt.show()
`)
assert.equal(plot.error, undefined)
assert.equal(plot.results.length, 1)
assert.equal(Buffer.from(plot.results[0].png, 'base64').subarray(0, 4).toString('latin1'), '\x89PNG')
assert.deepEqual([plot.results[0].chart.type, plot.results[0].chart.title], ['bar', 'grains'])
console.log('plot')

const failed = await sandbox.runCode('1 / 0')
assert.equal(failed.error.name, 'ZeroDivisionError')
console.log('error')

const context = await sandbox.createCodeContext({ language: 'javascript' })
assert.match((await sandbox.runCode('[1, 2].map((n) => n * 2)', { context })).text, /4/)
console.log('contexts')

assert.equal(await sandbox.kill(), true)
