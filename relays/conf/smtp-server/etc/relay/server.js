// nodemailer's smtp-server with limits, and a line in a file for each message.
'use strict'

const fs = require('node:fs')
const { SMTPServer } = require('/opt/relay/node_modules/smtp-server')

const S = JSON.parse(fs.readFileSync('/etc/relay/settings.json'))
const ledger = fs.openSync(S.Record, 'a')

function refusal(code, text) {
    return Object.assign(new Error(text), { responseCode: code })
}

const common = {
    name: 'relay.example',
    size: S.MaxSize,
    maxClients: S.MaxConns,
    socketTimeout: S.IdleSeconds * 1000,
    closeTimeout: 1000,
    disableReverseLookup: true,
    cert: fs.readFileSync(S.Cert),
    key: fs.readFileSync(S.Key),

    onMailFrom(address, session, callback) {
        session.messages = (session.messages || 0) + 1
        if (session.messages > S.MaxMessages) return callback(refusal(421, '4.7.0 too many messages on this connection'))
        if (address.address.startsWith('refused@')) return callback(refusal(550, '5.7.1 sender refused'))
        callback()
    },
    onRcptTo(address, session, callback) {
        if (address.address.startsWith('refused')) return callback(refusal(550, '5.1.1 no such user'))
        if (address.address.startsWith('busy')) return callback(refusal(450, '4.2.1 mailbox busy'))
        if (session.envelope.rcptTo.length >= S.MaxRecipients) return callback(refusal(452, '4.5.3 too many recipients'))
        callback()
    },
    onData(stream, session, callback) {
        const chunks = []
        stream.on('data', (chunk) => chunks.push(chunk))
        stream.on('end', () => {
            if (stream.sizeExceeded) return callback(refusal(552, '5.3.4 message too big'))
            const { mailFrom, rcptTo } = session.envelope
            const line = {
                from: (mailFrom && mailFrom.address) || '',
                to: rcptTo.map((rcpt) => rcpt.address),
                data: Buffer.concat(chunks).toString('base64'),
            }
            fs.writeSync(ledger, JSON.stringify(line) + '\n')
            callback(null, '2.0.0 OK')
        })
    },
    onAuth(auth, session, callback) {
        if (auth.username === S.User && auth.password === S.Password) return callback(null, { user: auth.username })
        callback(refusal(535, '5.7.8 wrong credentials'))
    },
}

for (const [port, options] of [
    [S.Plain, { disabledCommands: ['AUTH', 'STARTTLS'], authOptional: true }],
    [S.StartTLS, { authMethods: ['PLAIN'] }],
    [S.Implicit, { secure: true, authMethods: ['LOGIN'] }],
]) {
    const server = new SMTPServer({ ...common, ...options })
    server.on('error', (error) => console.error(error.message)) // of a session: a client that hung up, a failed handshake
    server.listen(port, '127.0.0.1')
}
