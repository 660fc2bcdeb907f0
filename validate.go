package smtprelay

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
)

// check returns all mistakes in m that can be found without a relay.
func (m *Message) check() error {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	if m.From == "" {
		mistake("From is empty; use NullSender for the empty envelope sender")
	} else if m.From != NullSender {
		if err := checkPath(m.From); err != nil {
			mistake("From %s: %w", quoted(m.From), err)
		}
	}
	if len(m.To) == 0 {
		mistake("To is empty: no recipients")
	}
	for _, to := range m.To {
		if isASCII(to) && strings.EqualFold(to, "postmaster") {
			continue // the only recipient allowed without a domain (RFC 5321, 4.1.1.3)
		}
		if err := checkPath(to); err != nil {
			mistake("To %s: %w", quoted(to), err)
		}
	}
	if m.Body == nil {
		mistake("Body is nil")
	} else if b, ok := m.Body.(body.Bytes); ok && len(b) == 0 {
		mistakes = append(mistakes, conn.ErrEmptyBody)
	}
	if o := m.MailOptions; o != nil {
		mistakes = append(mistakes, o.check()...)
	}
	var named map[string]bool
	if len(m.RcptOptions) > 0 {
		named = make(map[string]bool, len(m.To))
		for _, to := range m.To {
			named[to] = true
		}
	}
	for to, o := range m.RcptOptions {
		if !named[to] {
			mistake("RcptOptions for %s, which is not in To", quoted(to))
		}
		if o != nil {
			for _, err := range o.check() {
				mistake("RcptOptions of %s: %w", quoted(to), err)
			}
		}
	}
	return errors.Join(mistakes...)
}

// checkPath reports what is wrong with an address as envelope sender or recipient (RFC 5321, 4.1.2 and 4.5.3.1). It is strict
// about characters that a relay with a simple parser could read as the end of the address or as a parameter, and about invisible
// characters. It is lenient about dots in odd places, which some relays accept.
func checkPath(addr string) error {
	switch {
	case addr == "":
		return errors.New("the address is empty")
	case !utf8.ValidString(addr):
		return errors.New("not valid UTF-8")
	}
	if err := checkCharacters(addr); err != nil {
		return err
	}
	switch {
	case strings.ContainsAny(addr, "<>"): // in quotes too: not every relay parses quotes
		return errors.New("want the address alone, without angle brackets or display name")
	case len(addr) > maxAddress:
		return fmt.Errorf("%d octets, more than %d", len(addr), maxAddress)
	}
	at := strings.LastIndexByte(addr, '@')
	if at < 0 {
		return errors.New("no @")
	}
	local, domain := addr[:at], addr[at+1:]
	if local == "" || len(local) > 64 {
		return fmt.Errorf("the part before @ has %d octets: want 1 to 64", len(local))
	}
	if strings.HasPrefix(local, `"`) {
		if !validQuoted(local) {
			return errors.New("the quoted part before @ has no closing quote, or text after it")
		}
	} else if i := strings.IndexAny(local, "()[]:;@\\,\" "); i >= 0 {
		return fmt.Errorf("character %q before @", local[i])
	}
	if strings.HasPrefix(domain, "[") {
		if !validLiteral(domain) {
			return fmt.Errorf("domain %s is not an address literal", quoted(domain))
		}
		return nil
	}
	if !validDomain(asciiDomain(domain)) {
		return fmt.Errorf("%s is not a domain name", quoted(domain))
	}
	return nil
}

// checkCharacters reports characters that no address contains: control characters and invisible characters, some of which end a
// line or a word in a relay, and characters that Unicode normalisation turns into punctuation.
func checkCharacters(s string) error {
	for _, r := range s {
		switch {
		case unicode.IsControl(r):
			return fmt.Errorf("control character %+q", r)
		case isInvisible(r):
			return fmt.Errorf("invisible character %+q", r)
		case isFormOfPunctuation(r):
			return fmt.Errorf("character %+q", r)
		}
	}
	return nil
}

// isInvisible reports whether r is not printable: a format character (such as zero width or a change of direction), white space
// other than the ASCII space, or unassigned.
func isInvisible(r rune) bool {
	return !unicode.IsPrint(r) ||
		r > unicode.MaxLatin1 && unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}

// isFormOfPunctuation reports whether r is a small or full-width form of ASCII punctuation. A relay may apply Unicode
// normalisation (NFKC), which turns r into that character.
func isFormOfPunctuation(r rune) bool {
	return (0xfe50 <= r && r <= 0xfe6f || 0xff01 <= r && r <= 0xff5e) && !unicode.IsLetter(r) && !unicode.IsDigit(r)
}

// validQuoted reports whether s is a quoted string (RFC 5321, 4.1.2).
func validQuoted(s string) bool {
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			return i == len(s)-1 && i > 1
		}
	}
	return false
}

// asciiDomain replaces each non-ASCII character by a letter: only the form of SMTPUTF8 labels (RFC 6531, 3.3) is checked.
func asciiDomain(domain string) string {
	return strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf {
			return 'x'
		}
		return r
	}, domain)
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) < 0
}

func isPrintable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f }) < 0
}

// maxAddress is the maximum length of an address in octets. RFC 5321, 4.5.3.1.3 allows 256 with the angle brackets.
const maxAddress = 254

// quoted returns text, from the caller or a user, as quoted in an error.
func quoted[T ~string](text T) string { return printable.Quote(string(text), printable.MostAddress) }

// validHostName reports whether s is a host name that may be the argument of EHLO (RFC 5321, 2.3.5 and 4.1.2). Relays that check
// the argument refuse underscores, and names that look like an address.
func validHostName(s string) bool {
	if !validDomain(s) || strings.Contains(s, "_") {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 {
			return false
		}
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	return strings.Trim(last, "0123456789") != ""
}

// validDomain reports whether s is the domain of an address, in a form that some relay accepts.
func validDomain(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !(c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z') {
				return false
			}
		}
	}
	return true
}

// validLiteral reports whether s is an address literal (RFC 5321, 4.1.3).
func validLiteral(s string) bool {
	inner, ok := strings.CutPrefix(s, "[")
	if !ok {
		return false
	}
	if inner, ok = strings.CutSuffix(inner, "]"); !ok {
		return false
	}
	inner, v6 := strings.CutPrefix(inner, "IPv6:")
	ip := net.ParseIP(inner)
	return ip != nil && v6 == strings.Contains(inner, ":")
}

// check returns the mistakes in o that can be found without a relay.
func (o *MailOptions) check() (mistakes []error) {
	mistake := func(format string, args ...any) {
		mistakes = append(mistakes, fmt.Errorf("MailOptions."+format, args...))
	}
	switch o.Body {
	case "", Body7Bit, Body8BitMIME:
	case BodyBinaryMIME:
		mistake("Body BINARYMIME: the message is sent as text")
	default:
		mistake("Body %s is unknown", quoted(o.Body))
	}
	if o.Size < 0 {
		mistake("Size is negative")
	}
	switch o.Return {
	case "", DSNReturnFull, DSNReturnHeaders:
	default:
		mistake("Return %s: want FULL or HDRS", quoted(o.Return))
	}
	if len(o.EnvelopeID) > 100 || !isPrintable(o.EnvelopeID) {
		mistake("EnvelopeID: want at most 100 printable ASCII characters (RFC 3461, 4.4)")
	}
	if o.Auth != nil && *o.Auth != "" {
		if err := checkPath(*o.Auth); err != nil {
			mistake("Auth %s: %w", quoted(*o.Auth), err)
		}
	}
	if by := o.DeliverBy; by != nil {
		if by.Mode != DeliverByNotify && by.Mode != DeliverByReturn {
			mistake("DeliverBy.Mode %s: want N or R", quoted(by.Mode))
		}
		const most = 999_999_999
		if s := by.seconds(); s < -most || s > most {
			mistake("DeliverBy.Time is %d seconds: want at most nine digits (RFC 2852, 4)", s)
		} else if by.Mode == DeliverByReturn && s < 1 {
			mistake("DeliverBy.Time must be a second at least with mode R (RFC 2852, 4)")
		}
	}
	if p := o.Priority; p != nil && (*p < -9 || *p > 9) {
		mistake("Priority is %d: want -9 to 9 (RFC 6710, 3)", *p)
	}
	return mistakes
}

// check returns the mistakes in o that can be found without a relay.
func (o *RcptOptions) check() (mistakes []error) {
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	for i, n := range o.Notify {
		switch n {
		case DSNNotifyNever:
			if len(o.Notify) > 1 {
				mistake("Notify: NEVER must be alone (RFC 3461, 4.1)")
			}
		case DSNNotifyDelayed, DSNNotifyFailure, DSNNotifySuccess:
			if slices.Contains(o.Notify[:i], n) {
				mistake("Notify: %s is listed twice", n)
			}
		default:
			mistake("Notify %s is unknown", quoted(n))
		}
	}
	switch o.OriginalRecipientType {
	case "", DSNAddressTypeRFC822:
		if !isPrintable(o.OriginalRecipient) {
			mistake("OriginalRecipient %s is not printable ASCII; its type may be UTF-8", quoted(o.OriginalRecipient))
		}
	case DSNAddressTypeUTF8:
		if !utf8.ValidString(o.OriginalRecipient) {
			mistake("OriginalRecipient is not valid UTF-8")
		} else if err := checkCharacters(o.OriginalRecipient); err != nil {
			mistake("OriginalRecipient %s: %w", quoted(o.OriginalRecipient), err)
		}
	default:
		mistake("OriginalRecipientType %s is unknown", quoted(o.OriginalRecipientType))
	}
	if len(o.OriginalRecipient) > 500 {
		mistake("OriginalRecipient has more than 500 octets (RFC 3461, 4.2)")
	}
	if t := o.RequireRecipientValidSince; !t.IsZero() {
		if year := t.UTC().Year(); year < 1 || year > 9999 {
			mistakes = append(mistakes, errors.New("RequireRecipientValidSince: want a year from 1 to 9999 (RFC 3339)"))
		}
	}
	return mistakes
}
