// Package readback parses the mails that a fake relay has received, for tests of programs and libraries that build them.
package readback

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	netmail "net/mail"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

// Mail is a mail as its reader sees it.
type Mail struct {
	Header     netmail.Header
	Subject    string            // decoded
	Text, HTML string            // decoded, with the line ends of the message
	Files      map[string][]byte // attachments by name
}

// Message parses a message, whose envelope must be from and to, in this order.
func Message(tb testing.TB, m smtptest.Message, from string, to ...string) Mail {
	tb.Helper()
	if m.From != from || strings.Join(m.To, " ") != strings.Join(to, " ") {
		tb.Errorf("envelope: got %s to %q, want %s to %q", m.From, m.To, from, to)
	}
	parsed, err := netmail.ReadMessage(bytes.NewReader(m.Body))
	if err != nil {
		tb.Fatalf("the relay received an invalid mail: %v", err)
	}
	mail := Mail{Header: parsed.Header, Files: map[string][]byte{}}
	if mail.Subject, err = new(mime.WordDecoder).DecodeHeader(parsed.Header.Get("Subject")); err != nil {
		tb.Error(err)
	}
	mail.part(tb, parsed.Header, parsed.Body)
	return mail
}

// Only returns the one message that the relay has received.
func Only(tb testing.TB, relay *smtptest.Server) smtptest.Message {
	tb.Helper()
	all := relay.Messages()
	if len(all) != 1 {
		tb.Fatalf("the relay has received %d messages, want 1", len(all))
	}
	return all[0]
}

// part parses a part and the parts in it. header is a MIME header, of the message or the part.
func (m *Mail) part(tb testing.TB, header interface{ Get(string) string }, body io.Reader) {
	tb.Helper()
	kind, params, err := mime.ParseMediaType(header.Get("Content-Type"))
	if err != nil && header.Get("Content-Type") != "" {
		tb.Fatal(err)
	}
	if strings.HasPrefix(kind, "multipart/") {
		parts := multipart.NewReader(body, params["boundary"])
		for {
			p, err := parts.NextRawPart()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				tb.Fatal(err)
			}
			m.part(tb, p.Header, p)
		}
	}
	switch strings.ToLower(header.Get("Content-Transfer-Encoding")) {
	case "quoted-printable":
		body = quotedprintable.NewReader(body)
	case "base64":
		body = base64.NewDecoder(base64.StdEncoding, body)
	}
	text, err := io.ReadAll(body)
	if err != nil {
		tb.Fatal(err)
	}
	_, disposition, _ := mime.ParseMediaType(header.Get("Content-Disposition"))
	switch {
	case disposition["filename"] != "":
		m.Files[disposition["filename"]] = text
	case kind == "text/html":
		m.HTML = string(text)
	default:
		m.Text = string(text)
	}
}
