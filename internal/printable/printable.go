// Package printable makes untrusted text safe to show: on one line, of printable characters only, so that the text can neither
// forge a log line, control a terminal, nor pass for the program's own text.
package printable

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Maximum number of octets of a text that are shown. A longer text is cut, and marked with an ellipsis.
const (
	MostWords   = 1024 // of a reply
	MostAddress = 128
	MostLine    = 4096 // of a whole error
)

const ellipsis = "..."

// Quote returns text as a Go string literal of printable characters. If text is longer than most octets, the literal holds
// its beginning, and "..." follows the closing quote.
func Quote(text string, most int) string {
	mark := ""
	if len(text) > most {
		text, mark = cut(text, most), ellipsis
	}
	b := make([]byte, 0, len(text)+2+len(mark))
	b = append(b, '"')
	b = appendEscaped(b, text, `"\`)
	b = append(b, '"')
	return string(append(b, mark...))
}

// Address returns an envelope address in angle brackets. Unprintable characters, and characters that would end the brackets or a
// quoted text, are escaped as in a Go string.
func Address(addr string) string {
	mark := ""
	if len(addr) > MostAddress {
		addr, mark = cut(addr, MostAddress), ellipsis
	}
	b := make([]byte, 0, len(addr)+2+len(mark))
	b = append(b, '<')
	b = appendEscaped(b, addr, "<>\"\\ ")
	b = append(b, mark...)
	return string(append(b, '>'))
}

// Line returns text on one line of printable characters: unprintable characters are escaped as in a Go string. Quotes and
// backslashes are kept, so use it for a text that was checked or that consists of quoted parts.
func Line(text string) string {
	mark := ""
	if len(text) > MostLine {
		text, mark = cut(text, MostLine), ellipsis
	}
	if isPlain(text) {
		return text + mark
	}
	return string(append(appendEscaped(make([]byte, 0, len(text)+16), text, ""), mark...))
}

// Lines applies Line to each of texts. It returns texts itself if there is nothing to escape.
func Lines(texts []string) []string {
	for i, t := range texts {
		if Line(t) == t {
			continue
		}
		safe := make([]string, len(texts))
		copy(safe, texts[:i])
		for j := i; j < len(texts); j++ {
			safe[j] = Line(texts[j])
		}
		return safe
	}
	return texts
}

// cut returns the first most octets of text, or a few less to avoid splitting a rune.
func cut(text string, most int) string {
	n := most
	for n > most-utf8.UTFMax && n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	if n <= most-utf8.UTFMax { // not UTF-8
		n = most
	}
	return text[:n]
}

// isPlain reports whether text is printable ASCII.
func isPlain(text string) bool {
	for i := range len(text) {
		if text[i] < ' ' || text[i] > '~' {
			return false
		}
	}
	return true
}

const hex = "0123456789abcdef"

// appendEscaped appends text with unprintable characters, and the characters in special, escaped as in a Go string.
func appendEscaped(b []byte, text, special string) []byte {
	for i := 0; i < len(text); {
		r, size := rune(text[i]), 1
		if r >= utf8.RuneSelf {
			r, size = utf8.DecodeRuneInString(text[i:])
		}
		switch {
		case r == utf8.RuneError && size == 1:
			b = append(b, '\\', 'x', hex[text[i]>>4], hex[text[i]&15])
		case r < utf8.RuneSelf && strings.IndexByte(special, byte(r)) >= 0:
			if r == '"' || r == '\\' {
				b = append(b, '\\', byte(r))
			} else {
				b = append(b, '\\', 'x', hex[r>>4], hex[r&15])
			}
		case Prints(r):
			b = append(b, text[i:i+size]...)
		default:
			b = appendEscape(b, r)
		}
		i += size
	}
	return b
}

func appendEscape(b []byte, r rune) []byte {
	switch r {
	case '\n':
		return append(b, `\n`...)
	case '\r':
		return append(b, `\r`...)
	case '\t':
		return append(b, `\t`...)
	}
	form, digits := byte('x'), 2
	switch {
	case r > 0xFFFF:
		form, digits = 'U', 8
	case r >= utf8.RuneSelf:
		form, digits = 'u', 4
	}
	b = append(b, '\\', form)
	for shift := 4 * (digits - 1); shift >= 0; shift -= 4 {
		b = append(b, hex[r>>shift&15])
	}
	return b
}

// Prints reports whether r is shown unescaped: a graphic character or a space. Invisible characters, and characters that change the
// direction or the form of others, are escaped.
func Prints(r rune) bool {
	if r < utf8.RuneSelf {
		return ' ' <= r && r <= '~'
	}
	return unicode.IsPrint(r) && !unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}
