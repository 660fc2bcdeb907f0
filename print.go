package smtprelay

import (
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/smtprelay/smtprelay/internal/printable"
)

// LogValue implements slog.LogValuer: the text, and the step, outcome, scope, code and attempts as attributes.
func (e *Error) LogValue() slog.Value {
	return slog.GroupValue(append([]slog.Attr{slog.String("text", e.Error())}, e.attrs()...)...)
}

func (e *Error) attrs() []slog.Attr {
	attrs := []slog.Attr{slog.String("step", string(e.Op)), slog.String("outcome", e.Outcome.String()), slog.String("scope", e.Scope.String())}
	if e.Reply.Code != 0 {
		attrs = append(attrs, slog.Int("code", e.Reply.Code))
	}
	return append(attrs, slog.Int("attempts", e.Attempts))
}

// String returns the recipient, the outcome and the reply on one line of printable characters.
func (r RecipientResult) String() string {
	s := printable.Address(r.To) + " " + r.Outcome.String()
	if r.Reply.Code != 0 {
		s += ": " + r.Reply.String()
	}
	return s
}

// String returns the final reply, the identifier and the outcome for the first few recipients, on one line of printable characters.
func (r Receipt) String() string {
	var parts []string
	if r.Reply.Code != 0 {
		parts = append(parts, r.Reply.String())
	}
	if r.QueueID != "" {
		parts = append(parts, "queue ID "+printable.Line(r.QueueID))
	}
	for _, outcome := range []Outcome{Accepted, NotAccepted, Unknown} {
		var to []string
		for _, rcpt := range r.Recipients {
			if rcpt.Outcome == outcome {
				to = append(to, rcpt.To)
			}
		}
		if len(to) > 0 {
			parts = append(parts, outcome.String()+" for "+addresses(to))
		}
	}
	return strings.Join(parts, "; ")
}

// LogValue implements slog.LogValuer: the code, the identifier, and how many recipients had which outcome.
func (r Receipt) LogValue() slog.Value {
	var n [3]int
	for _, rcpt := range r.Recipients {
		if o := rcpt.Outcome; o >= 0 && int(o) < len(n) {
			n[o]++
		}
	}
	return slog.GroupValue(slog.Int("code", r.Reply.Code), slog.String("queue_id", printable.Line(r.QueueID)),
		slog.Int("accepted", n[Accepted]), slog.Int("not_accepted", n[NotAccepted]), slog.Int("unknown", n[Unknown]))
}

// String returns the envelope, with the first few recipients, on one line of printable characters.
func (m Message) String() string {
	return "from " + m.sender() + " to " + addresses(m.To)
}

func (m Message) sender() string {
	if m.From == NullSender {
		return NullSender
	}
	return printable.Address(m.From)
}

// Format implements fmt.Formatter: with every verb it prints what String returns.
func (m Message) Format(f fmt.State, _ rune) { io.WriteString(f, m.String()) }

// LogValue implements slog.LogValuer: the envelope.
func (m Message) LogValue() slog.Value {
	return slog.GroupValue(slog.String("from", m.sender()), slog.String("to", addresses(m.To)))
}

// String returns the envelope, and the receipt or the error, on one line of printable characters.
func (r Result) String() string {
	if r.Err != nil {
		return r.Message.String() + ": " + oneLine(r.Err)
	}
	return r.Message.String() + ": " + r.Receipt.String()
}

// LogValue implements slog.LogValuer: the envelope, and the receipt or the error.
func (r Result) LogValue() slog.Value {
	attrs := []slog.Attr{slog.Any("message", r.Message), slog.String("outcome", OutcomeOf(r.Err).String())}
	if r.Err != nil {
		return slog.GroupValue(append(attrs, slog.Any("err", r.Err))...)
	}
	return slog.GroupValue(append(attrs, slog.Any("receipt", r.Receipt))...)
}
