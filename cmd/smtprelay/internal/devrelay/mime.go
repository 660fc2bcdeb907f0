package devrelay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-message"
	_ "github.com/emersion/go-message/charset" // all that mail is written in
	"github.com/emersion/go-message/mail"
)

// What is read of a message, which may be made to hurt whoever reads it.
const (
	maxHeader = 256 << 10 // octets of the header of a message or of a part
	maxDepth  = 12        // multiparts within multiparts
	maxParts  = 500
	maxShown  = 2 << 20 // octets of text that are shown, and of HTML
	maxInline = 8 << 20 // octets of all images that are shown in the HTML
)

// A parsed message is what it says, as far as it can be read.
type parsed struct {
	Header      []headerField
	Text        string // all text/plain parts that are not attachments
	HTML        string // the first text/html part that is not one
	Attachments []attachment
	Problem     string // why not everything was read; "" if it was
}

// A headerField is a field of the header, decoded.
type headerField struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// An attachment is any part that is not shown as text or HTML.
type attachment struct {
	Part      int    `json:"part"` // which of the message's parts, counted from 1
	Name      string `json:"name"` // fit to be a file's name
	Type      string `json:"type"` // what the message says
	Size      int64  `json:"size"` // decoded, in octets
	ContentID string `json:"content_id,omitempty"`
}

// get returns the first field with the name.
func (p *parsed) get(name string) string {
	for _, f := range p.Header {
		if strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

// parse reads a message. Of text and HTML it keeps as much as limit allows, in octets.
func parse(body []byte, limit int64) *parsed {
	p := &parsed{}
	html := false
	err := eachPart(body, func(n int, e *message.Entity) error {
		if n == 0 {
			p.Header = decodedHeader(&e.Header)
			return nil
		}
		mediaType, params, _ := e.Header.ContentType()
		disposition, _, _ := e.Header.ContentDisposition()
		asFile := strings.EqualFold(disposition, "attachment") || params["name"] != ""
		switch {
		case mediaType == "text/plain" && !asFile, mediaType == "":
			text, _, err := readText(e.Body, limit-int64(len(p.Text)))
			p.Text += text
			return err
		case mediaType == "text/html" && !asFile && !html:
			var err error
			html = true
			p.HTML, _, err = readText(e.Body, limit)
			return err
		}
		a := attachment{Part: n, Name: fileName(e, n), Type: mediaType, ContentID: strings.Trim(e.Header.Get("Content-Id"), "<> ")}
		var err error
		a.Size, err = io.Copy(io.Discard, e.Body)
		p.Attachments = append(p.Attachments, a)
		return err
	})
	if err != nil {
		p.Problem = shortLine(err.Error())
	}
	return p
}

// readText reads a text: limit octets of it, made valid. The rest is counted.
func readText(r io.Reader, limit int64) (text string, size int64, err error) {
	var b bytes.Buffer
	n, err := io.Copy(&b, io.LimitReader(r, max(0, limit)))
	if err == nil {
		size, err = io.Copy(io.Discard, r)
	}
	return strings.ToValidUTF8(b.String(), "\uFFFD"), n + size, err
}

func decodedHeader(h *message.Header) []headerField {
	list := []headerField{}
	for fields := h.Fields(); fields.Next(); {
		value, err := fields.Text()
		if err != nil {
			value = fields.Value()
		}
		list = append(list, headerField{fields.Key(), strings.ToValidUTF8(value, "\uFFFD")})
	}
	return list
}

// part returns a part with its decoded octets, or nil if there is no such part.
func part(body []byte, want int) (octets []byte, name string, found bool) {
	eachPart(body, func(n int, e *message.Entity) error {
		if n != want || n == 0 {
			return nil
		}
		octets, _ = io.ReadAll(e.Body) // of a broken part what can be read
		name, found = fileName(e, n), true
		return errEnough
	})
	return octets, name, found
}

// fileName returns the name of a part as it may be given to a file and be shown: without folders, controls and characters that
// turn the direction of a text.
func fileName(e *message.Entity, n int) string {
	h := mail.AttachmentHeader{Header: e.Header}
	name, _ := h.Filename()
	name = strings.ToValidUTF8(name, "")
	name = name[strings.LastIndexAny(name, `/\`)+1:]
	name = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.In(r, unicode.Zl, unicode.Zp) || strings.ContainsRune(`"<>|:*?`, r) {
			return -1
		}
		return r
	}, name)
	for len(name) > 120 {
		_, size := utf8.DecodeLastRuneInString(name)
		name = name[:len(name)-size]
	}
	name = strings.Trim(name, ". ")
	if name == "" {
		return fmt.Sprintf("part-%d", n)
	}
	return name
}

var (
	errEnough = errors.New("the rest need not be read")

	errDepth = fmt.Errorf("more than %d multiparts within each other", maxDepth)
	errParts = fmt.Errorf("more than %d parts", maxParts)
	errBig   = fmt.Errorf("a header of more than %d octets", maxHeader)
)

// eachPart calls visit with the message as part 0, and with each part that is no multipart, counted from 1. It reads to the end
// what visit leaves. A message of one part is parts 0 and 1. An error of visit does not keep the other parts from being visited,
// but for errEnough; the first error is returned.
func eachPart(body []byte, visit func(n int, e *message.Entity) error) error {
	in := &allowance{r: bytes.NewReader(body), left: math.MaxInt64}
	e, err := message.ReadWithOptions(in, &message.ReadOptions{MaxHeaderBytes: maxHeader})
	if e == nil {
		return err
	}
	if err := visit(0, e); err != nil {
		return err
	}
	w := walker{in: in, visit: visit}
	if err := w.walk(e, 0); err != nil {
		w.failed = append(w.failed, err)
	}
	if len(w.failed) > 0 {
		return w.failed[0]
	}
	return nil
}

type walker struct {
	in     *allowance
	visit  func(n int, e *message.Entity) error
	parts  int
	failed []error // of single parts
}

func (w *walker) walk(e *message.Entity, depth int) error {
	if depth > maxDepth {
		return errDepth
	}
	multipart := e.MultipartReader()
	if multipart == nil {
		if w.parts++; w.parts > maxParts {
			return errParts
		}
		err := w.visit(w.parts, e)
		if err == errEnough {
			return err
		}
		if err == nil {
			_, err = io.Copy(io.Discard, e.Body)
		}
		if err != nil {
			w.failed = append(w.failed, fmt.Errorf("part %d: %w", w.parts, err))
		}
		return nil
	}
	for {
		w.in.left = maxHeader // for what is between two parts, and the header
		child, err := multipart.NextPart()
		w.in.left = math.MaxInt64
		if err == io.EOF {
			_, err := io.Copy(io.Discard, e.Body)
			return err
		}
		if child == nil {
			return err
		}
		if err := w.walk(child, depth+1); err != nil {
			return err
		}
	}
}

// allowance is a reader that gives out so much and no more.
type allowance struct {
	r    io.Reader
	left int64
}

func (a *allowance) Read(p []byte) (int, error) {
	if a.left <= 0 {
		return 0, errBig
	}
	n, err := a.r.Read(p[:min(int64(len(p)), a.left)])
	a.left -= int64(n)
	return n, err
}
