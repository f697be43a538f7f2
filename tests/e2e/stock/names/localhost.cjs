// Names below `localhost` are this machine (RFC 6761), whatever resolver it has.
const dns = require('node:dns')

const usual = dns.lookup
dns.lookup = (name, options, done) => {
  const own = typeof name === 'string' && name.endsWith('.localhost')
  return usual(own ? '127.0.0.1' : name, options, done)
}
