package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/textproto"
	"net/url"
	"time"
)

// mail is a message and its envelope.
type mail struct {
	from, to string
	data     []byte // in the format of RFC 5322
}

// compose returns a mail as text and as HTML, of which the reader's program shows the better one, with an attachment if there is
// one. Real services use a library such as wneessen/go-mail for this.
func compose(from, to, subject string, attachment []byte) (mail, error) {
	var buf bytes.Buffer
	id := fmt.Sprintf("%d.%s", time.Now().UnixNano(), to)
	unsubscribe := "https://example.com/unsubscribe?address=" + url.QueryEscape(to)
	fmt.Fprintf(&buf, "From: <%s>\r\nTo: <%s>\r\nSubject: %s\r\n", from, to, mime.QEncoding.Encode("utf-8", subject))
	fmt.Fprintf(&buf, "Date: %s\r\nMessage-ID: <%s>\r\nMIME-Version: 1.0\r\n", time.Now().Format(time.RFC1123Z), id)
	fmt.Fprintf(&buf, "List-Unsubscribe: <%s>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n", unsubscribe) // RFC 8058

	if attachment == nil {
		body := multipart.NewWriter(&buf)
		fmt.Fprintf(&buf, "Content-Type: multipart/alternative; boundary=%s\r\n\r\n", body.Boundary())
		err := writeAlternatives(body, to, subject)
		return mail{from, to, buf.Bytes()}, err
	}

	outer := multipart.NewWriter(&buf)
	fmt.Fprintf(&buf, "Content-Type: multipart/mixed; boundary=%s\r\n\r\n", outer.Boundary())
	inner := multipart.NewWriter(nil)
	part, err := outer.CreatePart(textproto.MIMEHeader{
		"Content-Type": {"multipart/alternative; boundary=" + inner.Boundary()},
	})
	if err != nil {
		return mail{}, err
	}
	boundary := inner.Boundary()
	inner = multipart.NewWriter(part)
	if err := inner.SetBoundary(boundary); err != nil {
		return mail{}, err
	}
	if err := writeAlternatives(inner, to, subject); err != nil {
		return mail{}, err
	}
	part, err = outer.CreatePart(textproto.MIMEHeader{
		"Content-Type":              {"application/octet-stream"},
		"Content-Disposition":       {`attachment; filename="figures.bin"`},
		"Content-Transfer-Encoding": {"base64"},
	})
	if err != nil {
		return mail{}, err
	}
	if err := writeBase64(part, attachment); err != nil {
		return mail{}, err
	}
	err = outer.Close()
	return mail{from, to, buf.Bytes()}, err
}

func writeAlternatives(w *multipart.Writer, to, subject string) error {
	for _, form := range []struct{ contentType, text string }{
		{"text/plain; charset=utf-8", fmt.Sprintf("Dear %s,\n\n%s is ready.\n.\nA dot at the start of a line is nothing to fear.\n", to, subject)},
		{"text/html; charset=utf-8", fmt.Sprintf("<p>Dear %s,</p>\n<p><b>%s</b> is ready.</p>\n", to, subject)},
	} {
		part, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Type":              {form.contentType},
			"Content-Transfer-Encoding": {"quoted-printable"},
		})
		if err != nil {
			return err
		}
		qp := quotedprintable.NewWriter(part)
		if _, err := io.WriteString(qp, form.text); err != nil {
			return err
		}
		if err := qp.Close(); err != nil {
			return err
		}
	}
	return w.Close()
}

// writeBase64 writes b in lines of 76 characters, as MIME requires.
func writeBase64(w io.Writer, b []byte) error {
	const perLine = 57 // bytes that 76 characters hold
	for len(b) > 0 {
		n := min(perLine, len(b))
		if _, err := fmt.Fprintf(w, "%s\r\n", base64.StdEncoding.EncodeToString(b[:n])); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
