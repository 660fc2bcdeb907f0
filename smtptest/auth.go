package smtptest

import (
	"cmp"
	"crypto/subtle"
	"strings"

	"github.com/emersion/go-smtp"
)

// auth executes AUTH with all its challenges.
func (c *conn) auth(line string) ending {
	e := Event{Step: Auth, Line: redact(line)}
	c.authLed = c.pipelined(&e)
	b := c.meet(e)
	if b.refuses() {
		return c.answer(b, nil)
	}
	if c.canStartTLS() {
		return c.answer(b, func() string { return "530 5.7.0 Must issue a STARTTLS command first" })
	}
	challenge := "" // a fault's, replaces go-smtp's
	if b.challenges() {
		f := strings.Fields(line)
		line = strings.Join(f[:min(2, len(f))], " ")
		b, challenge = blow{}, b.reply
	}
	reply := c.ask(line)
	for strings.HasPrefix(reply, "334") {
		c.say(cmp.Or(challenge, reply))
		response, _, end := c.readLine()
		if end != goOn {
			return end
		}
		c.log("C", "[redacted]")
		r := c.meet(Event{Step: AuthResponse})
		if r.refuses() {
			c.ask("*")
			return c.answer(r, nil)
		}
		if r.challenges() {
			challenge = r.reply
			continue
		}
		if r != (blow{}) {
			b = r
		}
		challenge, reply = "", c.ask(response)
	}
	if reply == "" {
		return lost
	}
	if positive(reply) {
		c.authed = true
		c.s.mu.Lock()
		c.stats.Authenticated = true
		c.s.mu.Unlock()
		reply = "235 Authentication successful"
	}
	return c.answer(b, func() string { return reply })
}

// SASLServer is the server side of a SASL mechanism (RFC 4422) for one authentication. Each sasl.Server of
// github.com/emersion/go-sasl is one.
type SASLServer interface {
	// Next takes a response of the client, nil if AUTH had no initial response, and returns the next challenge, or done when the
	// exchange is complete. An error refuses the credentials.
	Next(response []byte) (challenge []byte, done bool, err error)
}

func (s *Server) check(username, password string) error {
	same := func(a, b string) int { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) }
	if same(username, s.Username)&same(password, s.Password) == 0 {
		return smtp.ErrAuthFailed
	}
	return nil
}

// loginServer is the server side of LOGIN, which go-sasl lacks, with SendGrid's prompts.
type loginServer struct {
	check    func(username, password string) error
	username string
	asked    int
}

func (l *loginServer) Next(response []byte) (challenge []byte, done bool, err error) {
	if l.asked == 0 && response == nil {
		l.asked = 1
		return []byte("Username:"), false, nil
	}
	if l.asked < 2 { // a user name, perhaps the initial response
		l.asked = 2
		l.username = string(response)
		return []byte("Password:"), false, nil
	}
	return nil, true, l.check(l.username, string(response))
}
