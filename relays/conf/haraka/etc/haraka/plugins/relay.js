// The limits, the refusals, and a line in a file for each message.
'use strict'

const fs = require('node:fs')
const DSN = require('haraka-dsn')

const S = JSON.parse(fs.readFileSync('/etc/relay/settings.json'))
const ledger = fs.openSync(S.Record, 'a')
let open = 0

// text is an address as a string: a property in Haraka 3.3, a method before.
const text = (path) => (typeof path.address === 'function' ? path.address() : path.address)

exports.hook_connect = function (next, connection) {
    open++
    connection.notes.counted = true
    if (open > S.MaxConns) return next(DENYSOFTDISCONNECT, '4.7.0 too many connections')
    next()
}

exports.hook_disconnect = function (next, connection) {
    if (connection.notes.counted) open--
    next()
}

exports.hook_mail = function (next, connection, params) {
    connection.notes.messages = (connection.notes.messages || 0) + 1
    if (connection.notes.messages > S.MaxMessages) return next(DENYSOFTDISCONNECT, DSN.sys_not_accepting_mail('too many messages on this connection', 421))
    if (connection.local.port !== S.Plain && !connection.relaying) return next(DENY, '5.7.0 authentication required')
    if (params[0].user === 'refused') return next(DENY, '5.7.1 sender refused')
    next()
}

exports.hook_rcpt = function (next, connection, params) {
    const user = params[0].user
    if (user.startsWith('refused')) return next(DENY, '5.1.1 no such user')
    if (user.startsWith('busy')) return next(DENYSOFT, '4.2.1 mailbox busy')
    connection.transaction.notes.taken = (connection.transaction.notes.taken || 0) + 1
    if (connection.transaction.notes.taken > S.MaxRecipients) return next(DENYSOFT, DSN.proto_too_many_rcpts('too many recipients', 452))
    next(OK)
}

// Haraka runs hook_queue_outbound for messages of an authenticated client.
exports.hook_queue = keep
exports.hook_queue_outbound = keep

function keep(next, connection) {
    const { mail_from, rcpt_to, message_stream, uuid } = connection.transaction
    message_stream.get_data((data) => {
        const line = {
            id: uuid,
            from: text(mail_from),
            to: rcpt_to.map(text),
            data: data.toString('base64'),
        }
        fs.writeSync(ledger, JSON.stringify(line) + '\n')
        next(OK, 'queued')
    })
}
