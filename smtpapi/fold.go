package smtpapi

import (
	"bytes"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	foldAt  = 78  // octets of a line without its CRLF, where that is possible (RFC 5322, 2.1.1)
	maxLine = 998 // octets of a line without its CRLF (RFC 5322, 2.1.1; 1,000 with it: Building an X-SMTPAPI Header)

	// maxString is how long a string with its quotes may be: on a line of its own, white space precedes it and a comma or
	// colon follows.
	maxString = maxLine - 2
)

// escape replaces what is not printable ASCII in a JSON text by \u escapes, with surrogate pairs above U+FFFF (Building an
// X-SMTPAPI Header; RFC 8259, 7). Such characters occur in strings only. The text is valid UTF-8.
func escape(text []byte) []byte {
	if bytes.IndexFunc(text, needsEscape) < 0 {
		return text
	}
	b := make([]byte, 0, 2*len(text))
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		switch {
		case !needsEscape(r):
			b = append(b, text[0])
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
		text = text[n:]
	}
	return b
}

func needsEscape(r rune) bool { return r >= 0x7f }

// appendFolded appends the header field with the compact JSON text, folded between its tokens. No string is longer than
// maxString.
func appendFolded(b, text []byte) []byte {
	const name = "X-SMTPAPI: "
	b = append(b, name...)
	line := len(name)
	for len(text) > 0 {
		n := token(text)
		if line+n > foldAt {
			b = append(b, "\r\n "...)
			line = 1
		}
		b = append(b, text[:n]...)
		line += n
		text = text[n:]
	}
	return append(b, "\r\n"...)
}

// token returns the length of the JSON token that text begins with, and of the comma or colon after it.
func token(text []byte) int {
	n := 1
	switch text[0] {
	case '{', '}', '[', ']':
	case '"':
		for text[n] != '"' {
			if text[n] == '\\' {
				n++
			}
			n++
		}
		n++
	default: // a number, true or false
		for n < len(text) && !bytes.ContainsRune([]byte(",:{}[]"), rune(text[n])) {
			n++
		}
	}
	if n < len(text) && (text[n] == ',' || text[n] == ':') {
		n++
	}
	return n
}
