package wire

import (
	"strconv"
	"time"
)

// MailParams are the parameters of a MAIL command. The zero value of each field leaves its parameter out.
type MailParams struct {
	Body       string  // BODY=
	Size       int64   // SIZE=
	UTF8       bool    // SMTPUTF8
	Return     string  // RET=
	EnvelopeID string  // ENVID=, decoded
	RequireTLS bool    // REQUIRETLS
	Auth       *string // AUTH=, decoded; "" means <>
	By         By      // BY=
	Priority   *int    // MT-PRIORITY=
}

// By is the value of BY= (RFC 2852, 4).
type By struct {
	Mode    string // N or R; "" means no BY=
	Seconds int64
	Trace   bool
}

// RcptParams are the parameters of a RCPT command. The zero value of each field leaves its parameter out.
type RcptParams struct {
	Notify  []string  // NOTIFY=
	OrcptAs string    // the type of Orcpt; "" means RFC822
	Orcpt   string    // ORCPT=, decoded
	Since   time.Time // RRVS=
}

// AppendMail appends a MAIL command (RFC 5321, 4.1.1.2).
func AppendMail(b []byte, from string, p *MailParams) []byte {
	b = append(b, "MAIL FROM:<"...)
	b = append(b, from...)
	b = append(b, '>')
	if p.Body != "" {
		b = append(append(b, " BODY="...), p.Body...)
	}
	if p.Size > 0 {
		b = strconv.AppendInt(append(b, " SIZE="...), p.Size, 10)
	}
	if p.UTF8 {
		b = append(b, " SMTPUTF8"...)
	}
	if p.Return != "" {
		b = append(append(b, " RET="...), p.Return...)
	}
	if p.EnvelopeID != "" {
		b = appendXtext(append(b, " ENVID="...), p.EnvelopeID)
	}
	if p.RequireTLS {
		b = append(b, " REQUIRETLS"...)
	}
	if p.Auth != nil {
		b = append(b, " AUTH="...)
		if *p.Auth == "" {
			b = append(b, "<>"...)
		} else {
			b = appendXtext(b, *p.Auth)
		}
	}
	if by := p.By; by.Mode != "" {
		b = strconv.AppendInt(append(b, " BY="...), by.Seconds, 10)
		b = append(append(b, ';'), by.Mode...)
		if by.Trace {
			b = append(b, 'T')
		}
	}
	if p.Priority != nil {
		b = strconv.AppendInt(append(b, " MT-PRIORITY="...), int64(*p.Priority), 10)
	}
	return append(b, "\r\n"...)
}

// AppendRcpt appends a RCPT command (RFC 5321, 4.1.1.3). utf8 says whether the transaction uses SMTPUTF8.
func AppendRcpt(b []byte, to string, p *RcptParams, utf8 bool) []byte {
	b = append(b, "RCPT TO:<"...)
	b = append(b, to...)
	b = append(b, '>')
	for i, n := range p.Notify {
		if i == 0 {
			b = append(b, " NOTIFY="...)
		} else {
			b = append(b, ',')
		}
		b = append(b, n...)
	}
	if p.Orcpt != "" {
		kind := p.OrcptAs
		if kind == "" {
			kind = "RFC822"
		}
		b = append(append(append(b, " ORCPT="...), kind...), ';')
		switch {
		case kind != "UTF-8":
			b = appendXtext(b, p.Orcpt)
		case utf8:
			b = appendUnitext(b, p.Orcpt)
		default:
			b = appendUTF8Xtext(b, p.Orcpt)
		}
	}
	if !p.Since.IsZero() {
		b = p.Since.UTC().AppendFormat(append(b, " RRVS="...), time.RFC3339)
	}
	return append(b, "\r\n"...)
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

// appendUnitext appends s as utf-8-addr-unitext (RFC 6533, 3), for a transaction with SMTPUTF8.
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
