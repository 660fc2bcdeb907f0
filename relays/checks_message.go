package main

// Envelopes and bodies, and what relays refuse in them.

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtpapi"
)

func oneRefused(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	err = b.send(c, b.mail("ann", "refused", "bob"))
	if err := expect(err, smtprelay.Accepted, 0, "refused@relay.example 550"); err != nil {
		return err
	}
	return b.send(c, b.mail())
}

func oneBusy(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	err = b.send(c, b.mail("ann", "bob", "busy"))
	if err := expect(err, smtprelay.Accepted, 0, "busy@relay.example "+b.busyCode); err != nil {
		return err
	}
	if to := smtprelay.RetryTo(err); len(to) != 1 || to[0] != "busy@relay.example" {
		return fmt.Errorf("RetryTo is %q, but the only refusal is: %w", to, err)
	}
	return b.send(c, b.mail())
}

func allRefused(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	err = b.send(c, b.mail("refused", "refused2"))
	if err := expect(err, smtprelay.NotAccepted, 550, "refused@relay.example 550", "refused2@relay.example 550"); err != nil {
		return err
	}
	return b.send(c, b.mail())
}

func allOrNothing(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail("ann", "refused", "bob")
	s.allOrNothing = true
	if err := expect(b.send(c, s), smtprelay.NotAccepted, 550); err != nil {
		return err
	}
	s = b.mail("ann", "bob")
	s.allOrNothing = true
	return b.send(c, s)
}

func mailRefused(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	s.from = "refused@client.example"
	err = b.send(c, s)
	if err := expect(err, smtprelay.NotAccepted, 550); err != nil {
		return err
	}
	if e := err.(*smtprelay.Error); e.Op != smtprelay.OpMail {
		return fmt.Errorf("the refusal of MAIL is reported as a refusal of %s: %w", e.Op, err)
	}
	return b.send(c, b.mail())
}

// refusedInARow sends messages that are all refused. Postfix then says 421 after 20 errors, Exim hangs up after 10 commands that
// sent no mail. Each message must still get its own refusal.
func refusedInARow(b *bench) error {
	c, err := b.client(conns(1), messages(100))
	if err != nil {
		return err
	}
	for i := range 25 {
		if err := expect(b.send(c, b.mail("refused")), smtprelay.NotAccepted, 550); err != nil {
			return fmt.Errorf("message %d: %w", i+1, err)
		}
	}
	return b.send(c, b.mail())
}

func tooBig(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	s.setBody(lines(s.id, limits.MaxSize*3/2))
	if err := expectPermanent(b.send(c, s)); err != nil {
		return err
	}
	return b.send(c, b.mail())
}

func tooBigUnknown(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	text := lines(s.id, limits.MaxSize*3/2)
	s.setBody(text)
	s.body = smtprelay.Reader(onlyReader{strings.NewReader(s.header() + text)})
	if err := expectPermanent(b.send(c, s)); err != nil {
		return err
	}
	return b.send(c, b.mail())
}

// nearlyTooBig sends a message that just fits: it fails if the client declares more than it sends.
func nearlyTooBig(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	for range 3 {
		s := b.mail()
		s.setBody(lines(s.id, limits.MaxSize*9/10))
		if err := b.send(c, s); err != nil {
			return err
		}
	}
	s := b.mail()
	text := lines(s.id, limits.MaxSize*9/10)
	s.setBody(text)
	s.body = smtprelay.Reader(onlyReader{strings.NewReader(s.header() + text)})
	return b.send(c, s)
}

func lineEnds(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	for _, text := range []string{
		".\r\n..\r\n...x\r\n.x.\r\n\r\n.\r\n",
		"a\rb\nc\r\nd\n\re\r\rf\n\n",
		"smuggled\n.\nMAIL FROM:<evil@client.example>\nRCPT TO:<evil@relay.example>\nDATA\nX-Check: evil\n\nevil\n.\n",
		"smuggled\r.\rMAIL FROM:<evil@client.example>\r\r\n.\rx\n.\r\r\n",
		"no line end",
		"a dot without a line end\r\n.",
		"a bare CR at the end\r",
		"",
	} {
		s := b.mail()
		s.setBody(text)
		if err := b.send(c, s); err != nil {
			return err
		}
	}
	return nil
}

func eightBit(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	s.setBody("Grüße, κόσμε, \xff\xfe\x80, and a control \x01.\r\n")
	return b.send(c, s)
}

func nullReversePath(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	s := b.mail()
	s.from = ""
	return b.send(c, s)
}

func utf8Address(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	if err := c.Ping(b.ctx); err != nil {
		return err
	}
	s := b.mail("jürgen")
	s.options = &smtprelay.MailOptions{UTF8: true}
	err = b.send(c, s)
	if b.offered("SMTPUTF8") {
		return err
	}
	if err == nil {
		return errors.New("SMTPUTF8 is not offered, but an address that needs it was sent")
	}
	return expectPermanent(err)
}

// substitutions sends the longest header field that a program writes: the names of a thousand readers for SendGrid to substitute.
// The client folds it; the field must arrive as if it were not folded.
func substitutions(b *bench) error {
	c, err := b.client()
	if err != nil {
		return err
	}
	var to, names []string
	for i := range 1000 {
		to = append(to, fmt.Sprintf("reader%d@example.org", i))
		names = append(names, fmt.Sprintf(`Zoë "%d" \ Smith`, i))
	}
	h := smtpapi.Header{To: to, Sub: map[string][]string{"-name-": names}}
	field, err := h.Marshal()
	if err != nil {
		return err
	}
	text := regexp.MustCompile(`\r\n[ \t]+`).ReplaceAllString(strings.TrimSpace(string(field)), "")
	s := b.mail()
	s.json = strings.TrimPrefix(text, "X-SMTPAPI: ")
	var got struct {
		To  []string
		Sub map[string][]string
	}
	if err := json.Unmarshal([]byte(s.json), &got); err != nil || !slices.Equal(got.To, to) || !slices.Equal(got.Sub["-name-"], names) {
		return fmt.Errorf("the field does not contain what was put in: %v", err)
	}
	s.body = smtpapi.Prepend(h, s.body)
	return b.send(c, s)
}
