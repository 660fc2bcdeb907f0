package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/smtprelay/smtprelay"
)

// A mail is one message of the input.
type mail struct {
	source string // the file, and which message of it
	from   string
	to     []string
	header []byte                        // as it is sent: without Bcc, and with the empty line at its end
	open   func() (io.ReadCloser, error) // the rest
	sum    [sha256.Size]byte             // of envelope, header and rest
	key    string                        // of the journal: the sum, and which of those that are the same
}

// mostHeader is how long the header of a message may be, in octets.
const mostHeader = 1 << 20

// An envelope is what flags say of it; what is empty is taken from the header.
type envelope struct {
	from string
	to   []string
}

// mails reads the messages of args: files, folders of .eml, maildirs, mboxes, and "-" for stdin. The order is always the same.
// An error stands beside the source that it is about.
func mails(args []string, stdin io.Reader, env envelope) iter.Seq2[*mail, error] {
	return func(yield func(*mail, error) bool) {
		same := map[[sha256.Size]byte]int{}
		each := func(m *mail, err error) bool {
			if err == nil {
				err = m.seal(env)
			}
			if err != nil {
				return yield(nil, fmt.Errorf("%s: %w", m.source, err))
			}
			same[m.sum]++
			m.key = hex.EncodeToString(m.sum[:16]) + "-" + strconv.Itoa(same[m.sum])
			return yield(m, nil)
		}
		for _, arg := range args {
			if arg == "-" {
				if !eachOfReader("stdin", stdin, each) {
					return
				}
				continue
			}
			files, err := filesOf(arg)
			if err != nil && !each(&mail{source: arg}, err) {
				return
			}
			for _, file := range files {
				if !eachOfFile(file, each) {
					return
				}
			}
		}
	}
}

// filesOf lists the files of a file, a maildir (cur and new) or a folder of .eml, by name.
func filesOf(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	var files []string
	list := func(dir string, takes func(name string) bool) error {
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			if !e.IsDir() && takes(e.Name()) {
				files = append(files, filepath.Join(dir, e.Name()))
			}
		}
		return err
	}
	if isDir(filepath.Join(path, "cur")) && isDir(filepath.Join(path, "new")) {
		all := func(name string) bool { return !strings.HasPrefix(name, ".") }
		err = errors.Join(list(filepath.Join(path, "cur"), all), list(filepath.Join(path, "new"), all))
		// The part before the colon stays when a reader moves a message from new to cur.
		unique := func(file string) string { name, _, _ := strings.Cut(filepath.Base(file), ":"); return name }
		slices.SortFunc(files, func(a, b string) int { return strings.Compare(unique(a), unique(b)) })
	} else {
		err = list(path, func(name string) bool { return strings.EqualFold(filepath.Ext(name), ".eml") })
		if err == nil && len(files) == 0 {
			err = errors.New("there is no .eml in it, and it is no maildir")
		}
	}
	return files, err
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// withoutPath is err without the file's name, which is said already.
func withoutPath(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// eachOfFile reads a message, or the messages of an mbox, from a file. Of a message only the header is kept.
func eachOfFile(path string, each func(*mail, error) bool) bool {
	f, err := os.Open(path)
	if err != nil {
		return each(&mail{source: path}, withoutPath(err))
	}
	defer f.Close()
	r := bufio.NewReader(f)
	if begin, _ := r.Peek(5); string(begin) == "From " {
		return eachOfMbox(path, r, each)
	}
	m := &mail{source: path}
	n, err := m.readHeader(r)
	m.open = func() (io.ReadCloser, error) {
		f, err := os.Open(path)
		if err == nil {
			_, err = f.Seek(n, io.SeekStart)
		}
		return f, err
	}
	return each(m, err)
}

func eachOfReader(source string, in io.Reader, each func(*mail, error) bool) bool {
	r := bufio.NewReader(in)
	if begin, _ := r.Peek(5); string(begin) == "From " {
		return eachOfMbox(source, r, each)
	}
	text, err := io.ReadAll(r)
	m := inMemory(source, text)
	return each(m, oneOf(err, m.err()))
}

// eachOfMbox reads the messages of an mbox: each begins with a line "From …" after an empty one, and lines of the text that look
// like it have a ">" before them (mboxrd).
func eachOfMbox(source string, r *bufio.Reader, each func(*mail, error) bool) bool {
	var text []byte
	n, blank := 0, true
	flush := func() bool {
		if n == 0 {
			return true
		}
		text = bytes.TrimSuffix(text, []byte("\n")) // the empty line before the next "From "
		text = bytes.TrimSuffix(text, []byte("\r"))
		m := inMemory(fmt.Sprintf("%s, message %d", source, n), text)
		text = nil
		return each(m, m.err())
	}
	for {
		line, err := r.ReadBytes('\n')
		switch {
		case blank && bytes.HasPrefix(line, []byte("From ")):
			if !flush() {
				return false
			}
			n++
		case bytes.HasPrefix(bytes.TrimLeft(line, ">"), []byte("From ")) && line[0] == '>':
			text = append(text, line[1:]...)
		default:
			text = append(text, line...)
		}
		blank = len(bytes.TrimRight(line, "\r\n")) == 0
		if errors.Is(err, io.EOF) {
			return flush()
		}
		if err != nil {
			return each(&mail{source: source}, err)
		}
	}
}

// inMemory is a message whose text is there.
func inMemory(source string, text []byte) *mail {
	m := &mail{source: source}
	n, err := m.readHeader(bytes.NewReader(text))
	if err != nil {
		m.open = func() (io.ReadCloser, error) { return nil, err }
		return m
	}
	m.open = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text[n:])), nil }
	return m
}

// err is why the message of inMemory cannot be read.
func (m *mail) err() error {
	_, err := m.open()
	return err
}

// readHeader reads the header with the empty line at its end, takes Bcc out, and returns how many octets it had.
func (m *mail) readHeader(from io.Reader) (int64, error) {
	r := bufio.NewReader(io.LimitReader(from, mostHeader+1))
	var n int64
	var bcc bool // the line belongs to a field that is left out
	fields := 0
	for {
		line, err := r.ReadBytes('\n')
		n += int64(len(line))
		content := bytes.TrimRight(line, "\r\n")
		switch {
		case n > mostHeader:
			return 0, fmt.Errorf("the header is longer than %d octets: is it a message?", mostHeader)
		case len(content) == 0 && fields == 0:
			return 0, errors.New("there is no header: a message begins with fields such as From and Subject")
		case len(content) == 0:
			if len(line) == 0 { // the file ends with the header
				m.header = append(m.header, "\r\n"...)
			} else {
				m.header = append(m.header, line...)
			}
			return n, nil
		case bytes.ContainsRune(content, '\r'): // it becomes a line end on the way, and what follows may be a Bcc
			return 0, fmt.Errorf("line %d of the header has a carriage return in its midst: %q", fields+1, shorten(string(content)))
		case content[0] == ' ' || content[0] == '\t':
		default:
			name, value, _ := bytes.Cut(content, []byte(":"))
			if !isField(content) {
				return 0, fmt.Errorf("line %d is no field of a header: %q; is it a message?", fields+1, shorten(string(content)))
			}
			bcc = strings.EqualFold(string(name), "Bcc") || strings.EqualFold(string(name), "Resent-Bcc")
			if bcc {
				m.to = append(m.to, string(value)) // raw, until seal
			}
		}
		fields++
		switch {
		case bcc && (content[0] == ' ' || content[0] == '\t'):
			m.to[len(m.to)-1] += string(content)
		case !bcc:
			m.header = append(m.header, content...)
			m.header = append(m.header, "\r\n"...)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
	}
}

func shorten(text string) string {
	if len(text) > 60 {
		return text[:60] + "…"
	}
	return text
}

var errNoRecipient = errors.New("there is no recipient: neither --to nor an address in To, Cc or Bcc")

// seal completes the envelope from the header, and makes the sum.
func (m *mail) seal(env envelope) error {
	bcc := m.to
	fields, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(m.header))).ReadMIMEHeader()
	if err != nil {
		return fmt.Errorf("the header cannot be read: %w", err)
	}
	if m.from = env.from; m.from == "" {
		for _, name := range []string{"Sender", "From"} {
			if senders, err := smtprelay.ParseAddresses(fields.Get(name)); err == nil && len(senders) > 0 {
				m.from = senders[0]
				break
			}
		}
	}
	if m.from == "" {
		return errors.New("there is no sender: neither --from nor an address in From")
	}
	if m.to = env.to; len(m.to) == 0 {
		if m.to, err = smtprelay.ParseAddresses(slices.Concat(fields["To"], fields["Cc"], bcc)...); err != nil {
			return oneOf(err)
		}
	}
	m.to = unique(m.to)
	if len(m.to) == 0 {
		return errNoRecipient
	}
	m.sum, err = m.hash(io.Discard)
	return err
}

// unique returns each of list once, in its order.
func unique(list []string) []string {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool {
		was := seen[s]
		seen[s] = true
		return was
	})
}

// hash writes the message to w and returns the sum of it and its envelope.
func (m *mail) hash(w io.Writer) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q\n", m.from, m.to)
	body, err := m.open()
	if err != nil {
		return sum, withoutPath(err)
	}
	defer body.Close()
	_, err = io.Copy(io.MultiWriter(h, w), io.MultiReader(bytes.NewReader(m.header), body))
	h.Sum(sum[:0])
	return sum, err
}

// A body is what the library sends of a mail. Before the end of the message can leave, intent is called.
type body struct {
	mail   *mail
	intent func() error
}

var errChanged = errors.New("the file has changed since it was read")

func (b *body) WriteTo(w io.Writer) (int64, error) {
	n := &counter{w: w}
	sum, err := b.mail.hash(n)
	if err == nil && sum != b.mail.sum {
		err = errChanged
	}
	if err == nil {
		err = b.intent()
	}
	return n.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
