package smtprelay

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net/mail"
	"strings"
)

// ParseAddresses returns the bare addresses in list, for From and To of a [Message]. Each element is the value of a header field such as
// To or Cc: any number of addresses, with or without display names (RFC 5322, 3.4). Empty elements and empty groups are skipped. Order
// and duplicates are kept.
//
// The error is an *[Error] that names every element that cannot be parsed; the result is then nil.
func ParseAddresses(list ...string) ([]string, error) {
	// A name in a character set that is not known is no reason to refuse the address beside it.
	anyCharset := &mime.WordDecoder{CharsetReader: func(_ string, input io.Reader) (io.Reader, error) { return input, nil }}
	parser := mail.AddressParser{WordDecoder: anyCharset}
	var addrs []string
	var mistakes []error
	for _, header := range list {
		if strings.TrimSpace(header) == "" {
			continue
		}
		parsed, err := parser.ParseList(header)
		if err != nil {
			mistakes = append(mistakes, fmt.Errorf("addresses %s: %s", quoted(header), strings.TrimPrefix(err.Error(), "mail: ")))
		}
		for _, a := range parsed {
			// The parser takes the quotes from "ann smith"@example.org, and String puts them back.
			addr := withoutBrackets((&mail.Address{Address: a.Address}).String())
			if err := checkPath(addr); err != nil {
				mistakes = append(mistakes, fmt.Errorf("address %s: %w", quoted(addr), err))
			}
			addrs = append(addrs, addr)
		}
	}
	if len(mistakes) > 0 {
		return nil, &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, Err: errors.Join(mistakes...), permanent: true}
	}
	return addrs, nil
}

// GoMail is a message that knows its envelope. A *mail.Msg of github.com/wneessen/go-mail is one.
type GoMail interface {
	io.WriterTo
	GetSender(useFullAddr bool) (string, error) // the envelope's sender, maybe in angle brackets
	GetRecipients() ([]string, error)           // all that are to get the message, blind copies included
}

// MessageOf returns a Message with m as its Body and m's own envelope: its sender, and each of its recipients (To, Cc, Bcc) once. m
// must not change until Send has returned. The error is an *[Error] with [OpCheck] that wraps m's, if it has no sender or no recipients.
func MessageOf(m GoMail) (Message, error) {
	from, err := m.GetSender(false)
	if err == nil {
		var to []string
		if to, err = m.GetRecipients(); err == nil {
			return Message{From: withoutBrackets(from), To: onceEach(to), Body: m}, nil
		}
	}
	if e, ok := errors.AsType[*Error](err); ok { // of ParseAddresses, say
		return Message{}, e
	}
	return Message{}, &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, Err: err, permanent: true}
}

// onceEach returns the addresses of to without brackets, in their order and each once.
func onceEach(to []string) []string {
	addrs, seen := make([]string, 0, len(to)), make(map[string]bool, len(to))
	for _, addr := range to {
		if addr = withoutBrackets(addr); !seen[addr] {
			seen[addr] = true
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// withoutBrackets takes off the angle brackets around addr, if it has them.
func withoutBrackets(addr string) string {
	if addr == NullSender {
		return addr
	}
	if inner, ok := strings.CutPrefix(addr, "<"); ok {
		if inner, ok = strings.CutSuffix(inner, ">"); ok {
			return inner
		}
	}
	return addr
}
