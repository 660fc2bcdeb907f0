package relayenmime

import (
	"io"
	netmail "net/mail"

	"github.com/smtprelay/smtprelay"
)

// envelope is a Sender that keeps what it is given, and a smtprelay.GoMail.
type envelope struct {
	from string
	to   []string
	body io.WriterTo
	err  error
}

func (e *envelope) Send(reversePath string, recipients []string, msg []byte) error {
	e.from, e.to, e.body = reversePath, recipients, smtprelay.Bytes(msg)
	return nil
}

func (e *envelope) WriteTo(w io.Writer) (int64, error) { return e.body.WriteTo(w) }

func (e *envelope) GetSender(bool) (string, error) { return withBrackets(e.from), e.err }

func (e *envelope) GetRecipients() ([]string, error) {
	to := make([]string, len(e.to))
	for i, addr := range e.to {
		to[i] = withBrackets(addr)
	}
	return to, e.err
}

// withBrackets puts quotes around a local part that needs them: enmime has addresses as net/mail parses them, without.
func withBrackets(addr string) string { return (&netmail.Address{Address: addr}).String() }
