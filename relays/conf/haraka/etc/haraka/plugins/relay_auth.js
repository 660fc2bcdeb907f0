// AUTH with one user, PLAIN or LOGIN by port.
'use strict'

const fs = require('node:fs')

const S = JSON.parse(fs.readFileSync('/etc/relay/settings.json'))

exports.register = function () {
    this.inherits('auth/auth_base')
}

exports.hook_capabilities = function (next, connection) {
    if (connection.tls.enabled) {
        const method = connection.local.port === S.Implicit ? 'LOGIN' : 'PLAIN'
        connection.capabilities.push(`AUTH ${method}`)
        connection.notes.allowed_auth_methods = [method]
    }
    next()
}

exports.get_plain_passwd = function (user, connection, cb) {
    cb(user === S.User ? S.Password : null)
}
