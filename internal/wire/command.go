package wire

import (
	"strconv"
	"time"

	"github.com/emersion/go-smtp"
)

// AppendMail appends a MAIL command (RFC 5321, 4.1.1.2) with the parameters that opts sets, and those of rcpt, which may be
// nil, that go-smtp keeps with the recipients though they stand here: BY (RFC 2852, 4) and MT-PRIORITY (RFC 6710, 3).
func AppendMail(b []byte, from string, opts *smtp.MailOptions, rcpt *smtp.RcptOptions) []byte {
	b = append(b, "MAIL FROM:<"...)
	b = append(b, from...)
	b = append(b, '>')
	if opts.Body != "" {
		b = append(append(b, " BODY="...), opts.Body...)
	}
	if opts.Size > 0 {
		b = strconv.AppendInt(append(b, " SIZE="...), opts.Size, 10)
	}
	if opts.UTF8 {
		b = append(b, " SMTPUTF8"...)
	}
	if opts.Return != "" {
		b = append(append(b, " RET="...), opts.Return...)
	}
	if opts.EnvelopeID != "" {
		b = appendXtext(append(b, " ENVID="...), opts.EnvelopeID)
	}
	if opts.RequireTLS {
		b = append(b, " REQUIRETLS"...)
	}
	if opts.Auth != nil {
		b = append(b, " AUTH="...)
		if *opts.Auth == "" {
			b = append(b, "<>"...)
		} else {
			b = appendXtext(b, *opts.Auth)
		}
	}
	if rcpt != nil {
		b = appendUrgency(b, rcpt)
	}
	return append(b, "\r\n"...)
}

func appendUrgency(b []byte, rcpt *smtp.RcptOptions) []byte {
	if by := rcpt.DeliverBy; by != nil {
		b = strconv.AppendInt(append(b, " BY="...), int64(by.Time/time.Second), 10)
		b = append(append(b, ';'), by.Mode...)
		if by.Trace {
			b = append(b, 'T')
		}
	}
	if p := rcpt.MTPriority; p != nil {
		b = strconv.AppendInt(append(b, " MT-PRIORITY="...), int64(*p), 10)
	}
	return b
}

// AppendRcpt appends a RCPT command (RFC 5321, 4.1.1.3) with the parameters that opts, which may be nil, sets, but for
// those that AppendMail writes.
// utf8 tells whether the transaction is one of SMTPUTF8.
func AppendRcpt(b []byte, to string, opts *smtp.RcptOptions, utf8 bool) []byte {
	b = append(b, "RCPT TO:<"...)
	b = append(b, to...)
	b = append(b, '>')
	if opts != nil {
		b = appendRcptParams(b, opts, utf8)
	}
	return append(b, "\r\n"...)
}

func appendRcptParams(b []byte, opts *smtp.RcptOptions, utf8 bool) []byte {
	for i, n := range opts.Notify {
		if i == 0 {
			b = append(b, " NOTIFY="...)
		} else {
			b = append(b, ',')
		}
		b = append(b, n...)
	}
	if opts.OriginalRecipient != "" {
		kind := opts.OriginalRecipientType
		if kind == "" {
			kind = smtp.DSNAddressTypeRFC822
		}
		b = append(append(append(b, " ORCPT="...), kind...), ';')
		switch {
		case kind != smtp.DSNAddressTypeUTF8:
			b = appendXtext(b, opts.OriginalRecipient)
		case utf8:
			b = appendUnitext(b, opts.OriginalRecipient)
		default:
			b = appendUTF8Xtext(b, opts.OriginalRecipient)
		}
	}
	if t := opts.RequireRecipientValidSince; !t.IsZero() {
		b = t.UTC().AppendFormat(append(b, " RRVS="...), time.RFC3339)
	}
	return b
}

const upperHex = "0123456789ABCDEF"

// appendXtext appends s as xtext (RFC 3461, 4).
func appendXtext(b []byte, s string) []byte {
	for _, c := range []byte(s) {
		if c < '!' || c > '~' || c == '+' || c == '=' {
			b = append(b, '+', upperHex[c>>4], upperHex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return b
}

// appendUnitext appends s as utf-8-addr-unitext (RFC 6533, 3), for a transaction of SMTPUTF8.
func appendUnitext(b []byte, s string) []byte {
	for _, r := range s {
		if r <= ' ' || r == 0x7f || r == '\\' || r == '+' || r == '=' {
			b = appendEmbedded(b, r)
		} else {
			b = append(b, string(r)...)
		}
	}
	return b
}

// appendUTF8Xtext appends s as utf-8-addr-xtext (RFC 6533, 3), which is ASCII.
func appendUTF8Xtext(b []byte, s string) []byte {
	for _, r := range s {
		if r <= ' ' || r >= 0x7f || r == '\\' || r == '+' || r == '=' {
			b = appendEmbedded(b, r)
		} else {
			b = append(b, string(r)...)
		}
	}
	return b
}

func appendEmbedded(b []byte, r rune) []byte {
	b = append(b, `\x{`...)
	start := len(b)
	b = strconv.AppendInt(b, int64(r), 16)
	for i := start; i < len(b); i++ {
		if 'a' <= b[i] && b[i] <= 'f' {
			b[i] -= 'a' - 'A'
		}
	}
	if len(b)-start < 2 {
		b = append(b[:start], '0', b[start])
	}
	return append(b, '}')
}
