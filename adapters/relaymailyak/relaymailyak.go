// Package relaymailyak sends the messages of mailyak (github.com/domodwyer/mailyak/v3) through a smtprelay.Client.
//
//	import "github.com/smtprelay/smtprelay/adapters/relaymailyak"
//
//	err := relaymailyak.Send(ctx, client, m) // was: m.Send()
//
// The host and the Auth that you give to mailyak.New are not used: mailyak.New("", nil) will do.
package relaymailyak

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"

	"github.com/domodwyer/mailyak/v3"

	"github.com/smtprelay/smtprelay"
)

// MessageOf builds m and returns it with its envelope: the address given to From, and those given to To, Cc and Bcc, each once. m
// has no method that returns them, so MessageOf reads them from the header that m writes. It removes the Bcc fields from it, and
// calls m.WriteBccHeader(false). The readers that m attaches are used up.
func MessageOf(m *mailyak.MailYak) (smtprelay.Message, error) {
	m.WriteBccHeader(true)
	defer m.WriteBccHeader(false)
	raw, err := m.MimeBuf()
	if err != nil {
		return smtprelay.MessageOf(&envelope{err: err})
	}
	e := read(raw.Bytes())
	msg, err := smtprelay.MessageOf(e)
	if err == nil {
		msg.Body = smtprelay.Bytes(e.message)
	}
	return msg, err
}

// Send sends m through client: to all of its recipients or, if the relay refuses one of them, to nobody, as with m.Send;
// client.Send with the result of [MessageOf] delivers to the others. Its error is an *smtprelay.Error.
func Send(ctx context.Context, client *smtprelay.Client, m *mailyak.MailYak) error {
	msg, err := MessageOf(m)
	if err != nil {
		return err
	}
	msg.AllOrNothing = true
	_, err = client.Send(ctx, msg)
	return err
}

// envelope is a smtprelay.GoMail.
type envelope struct {
	from    string
	to      []string // as the header has them
	message []byte   // without Bcc
	err     error
}

var (
	errNoFrom  = errors.New("the message has no From")
	errControl = errors.New("the header has a carriage return inside a line")
)

// read takes the envelope out of a message by mailyak, which folds none of these fields. A line that only a bare CR ends for some
// relays would be a field that nobody has asked for.
func read(raw []byte) *envelope {
	e := &envelope{}
	header, body, _ := bytes.Cut(raw, []byte("\r\n\r\n"))
	for line := range bytes.SplitSeq(header, []byte("\r\n")) {
		name, value, _ := strings.Cut(string(line), ":")
		value = strings.TrimSpace(value)
		switch {
		case strings.ContainsAny(string(line), "\r\n"):
			e.err = errControl
		case strings.EqualFold(name, "From") && e.from == "":
			e.from = value
			if at := strings.LastIndexByte(value, '<'); at >= 0 {
				e.from = value[at:]
			}
		case strings.EqualFold(name, "Bcc"):
			e.to = append(e.to, value)
			continue
		case strings.EqualFold(name, "To"), strings.EqualFold(name, "Cc"):
			e.to = append(e.to, value)
		}
		e.message = append(append(e.message, line...), "\r\n"...)
	}
	e.message = append(append(e.message, "\r\n"...), body...)
	return e
}

func (e *envelope) WriteTo(w io.Writer) (int64, error) { return smtprelay.Bytes(e.message).WriteTo(w) }

func (e *envelope) GetSender(bool) (string, error) {
	if e.err == nil && (e.from == "" || e.from == smtprelay.NullSender) { // "Name <>" without an address
		return "", errNoFrom
	}
	return e.from, e.err
}

func (e *envelope) GetRecipients() ([]string, error) { return smtprelay.ParseAddresses(e.to...) }
