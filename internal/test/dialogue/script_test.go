// Reads transcripts. README.md describes the format; change both together.
package dialogue

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A script is a conversation from testdata; README.md describes the format.
type script struct {
	name     string
	lines    []string          // of the file, for -update
	config   map[string]string // from the "# config:" lines
	steps    []step
	sections map[string]string
}

// A step is one line of a script.
type step struct {
	kind byte   // '>', '<', '~', '!', '=', or 'C' and 'S' for what client and relay send
	form byte   // of 'C' and 'S': ':' a line, '-' bytes, '*' any bytes, '!' the end of the connection
	conn int    // for 'C', 'S', '!': the connection, 1-based
	text string // what follows
	file string
	line int
}

func (s step) String() string {
	head := string(s.kind)
	if s.conn > 1 {
		head += strconv.Itoa(s.conn)
	}
	if s.form != 0 {
		head += string(s.form)
	}
	return strings.TrimSpace(head + " " + s.text)
}

func (s step) where() string { return fmt.Sprintf("%s:%d", s.file, s.line) }

// errorf returns an error that names the line of the script.
func (s step) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %s\n%s", s.where(), s, fmt.Sprintf(format, args...))
}

const scriptDir = "testdata"

// scriptFiles lists the scripts; files whose names begin with an underscore are fragments.
func scriptFiles() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(scriptDir, "*.txt"))
	return slices.DeleteFunc(files, func(f string) bool { return strings.HasPrefix(filepath.Base(f), "_") }), err
}

func readScript(file string) (*script, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	s := &script{
		name:     strings.TrimSuffix(filepath.Base(file), ".txt"),
		config:   map[string]string{},
		sections: map[string]string{},
	}
	head := s.splitSections(string(data))
	s.lines = strings.Split(strings.TrimSuffix(head, "\n"), "\n")
	return s, s.read(file, 1, s.lines)
}

// splitSections removes the txtar sections from text and returns the text before them.
func (s *script) splitSections(text string) (head string) {
	var name string
	var b bytes.Buffer
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		next, ok := strings.CutPrefix(trimmed, "-- ")
		next, ok2 := strings.CutSuffix(next, " --")
		if !ok || !ok2 {
			b.WriteString(line)
			continue
		}
		if name == "" {
			head = b.String()
		} else {
			s.sections[name] = b.String()
		}
		b.Reset()
		name = strings.TrimSpace(next)
	}
	if name == "" {
		return b.String()
	}
	s.sections[name] = b.String()
	return head
}

var (
	speechLine = regexp.MustCompile(`^([CS])(\d*)([:\-*!]) ?(.*)$`)
	actionLine = regexp.MustCompile(`^([<>~=!@])(\d*)(?: (.*))?$`)
)

// read appends the steps of lines. In a fragment, connection 1 is that of the @ line that includes it.
func (s *script) read(file string, conn int, lines []string) error {
	for i, text := range lines {
		if config, ok := strings.CutPrefix(text, "# config:"); ok {
			for _, w := range words(config) {
				s.config[w.key] = w.value
			}
			continue
		}
		if text == "" || text[0] == '#' {
			continue
		}
		st := step{file: file, line: i + 1, conn: conn}
		m := speechLine.FindStringSubmatch(text)
		if m != nil {
			st.form, st.text = m[3][0], m[4]
		} else if m = actionLine.FindStringSubmatch(text); m != nil {
			st.text = strings.TrimSpace(m[3])
		} else {
			return fmt.Errorf("%s:%d: %q is not a line of a script", file, i+1, text)
		}
		st.kind = m[1][0]
		if m[2] != "" {
			st.conn, _ = strconv.Atoi(m[2])
		}
		if st.kind != '@' {
			s.steps = append(s.steps, st)
			continue
		}
		fragment := filepath.Join(scriptDir, "_"+st.text+".txt")
		data, err := os.ReadFile(fragment)
		if err != nil {
			return st.errorf("%v", err)
		}
		if err := s.read(fragment, st.conn, strings.Split(string(data), "\n")); err != nil {
			return err
		}
	}
	return nil
}

// A word is "key" or "key=value", the value quoted if it has spaces.
type word struct{ key, value string }

var wordForm = regexp.MustCompile(`([^\s=]+)(?:=("(?:[^"\\]|\\.)*"|\S*))?`)

func words(text string) (ws []word) {
	for _, m := range wordForm.FindAllStringSubmatch(text, -1) {
		value := m[2]
		if q, err := strconv.Unquote(value); err == nil {
			value = q
		}
		ws = append(ws, word{m[1], value})
	}
	return ws
}

// settings gives typed access to the words of a line, and remembers the words that were not asked for.
type settings struct {
	values map[string]string
	err    error
}

func (o *settings) take(key string) (string, bool) {
	v, ok := o.values[key]
	delete(o.values, key)
	return v, ok
}

func (o *settings) text(key, otherwise string) string {
	if v, ok := o.take(key); ok {
		return v
	}
	return otherwise
}

func (o *settings) flag(key string) bool {
	_, ok := o.take(key)
	return ok
}

func (o *settings) number(key string, otherwise int) int {
	v, ok := o.take(key)
	if !ok {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		o.err = fmt.Errorf("%s: %v", key, err)
	}
	return n
}

func (o *settings) duration(key string) time.Duration {
	v, ok := o.take(key)
	if !ok {
		return 0
	}
	t, err := time.ParseDuration(v)
	if err != nil {
		o.err = fmt.Errorf("%s: %v", key, err)
	}
	return t
}

// rest returns the first mistake: a value that does not parse, or an unknown word.
func (o *settings) rest() error {
	for key := range o.values {
		return fmt.Errorf("unknown word %q", key)
	}
	return o.err
}

// unescape replaces \r, \n, \t, \\ and \x00.
func unescape(text string) (string, error) {
	s, err := strconv.Unquote(`"` + strings.ReplaceAll(strings.ReplaceAll(text, "\n", `\n`), `"`, `\"`) + `"`)
	if err != nil {
		return "", fmt.Errorf("bad escape in %q", text)
	}
	return s, nil
}

// escape is the reverse of unescape, for writing to a script.
func escape(text string) string {
	q := strconv.Quote(text)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// offers reports whether the relay of the script offers an extension.
func (s *script) offers(keyword string) bool {
	return slices.ContainsFunc(s.steps, func(st step) bool {
		return st.kind == 'S' && strings.HasPrefix(st.text, "250") && strings.HasPrefix(strings.TrimLeft(st.text[3:], " -"), keyword)
	})
}

// canonical returns body as BDAT must carry it: every line end a CRLF. It works by characters and the client by buffers, so that
// a mistake is not made twice.
func canonical(body string) string {
	var b strings.Builder
	for i := 0; i < len(body); i++ {
		switch ch := body[i]; {
		case ch == '\r' && i+1 < len(body) && body[i+1] == '\n':
			// handled at the LF
		case ch == '\r', ch == '\n':
			b.WriteString("\r\n")
		default:
			b.WriteByte(ch)
		}
	}
	if text := b.String(); text == "" || strings.HasSuffix(text, "\n") {
		return text
	}
	return b.String() + "\r\n"
}

// onTheWire returns body as DATA must carry it: leading dots doubled, with the final dot.
func onTheWire(body string) string {
	body = "\r\n" + canonical(body)
	return strings.ReplaceAll(body, "\r\n.", "\r\n..")[2:] + ".\r\n"
}

// said returns the bytes that a C or S line stands for: its text, or what its braces stand for. behind is the line before it.
func (s *script) said(st, behind step) (string, error) {
	var n int
	switch {
	case st.form == '!' || st.form == '*':
		return "", nil
	case st.form == '-' && !strings.HasPrefix(st.text, "{"):
		return unescape(st.text)
	case st.form == '-' && st.kind == 'S':
		if _, err := fmt.Sscanf(st.text, "{%d octets}", &n); err != nil {
			return "", st.errorf("%v", err)
		}
		return strings.Repeat("x", n), nil
	case st.kind == 'S':
		if _, err := fmt.Sscanf(st.text, "{%d times ", &n); err == nil {
			_, line, _ := strings.Cut(st.text, " times ")
			return strings.Repeat(strings.TrimSuffix(line, "}")+"\r\n", n), nil
		}
	default:
		if _, err := fmt.Sscanf(st.text, "{more %d}", &n); err == nil {
			var b strings.Builder
			for _, to := range moreRecipients(n) {
				b.WriteString("RCPT TO:<" + to + ">\r\n")
			}
			return b.String(), nil
		}
	}
	if name, ok := strings.CutPrefix(st.text, "{"); ok && strings.HasSuffix(name, "}") && st.kind == 'C' {
		name, part, ranged := strings.Cut(strings.TrimSuffix(name, "}"), " ")
		text, err := s.body(name)
		if err != nil {
			return "", st.errorf("%v", err)
		}
		wire := onTheWire(text)
		if strings.HasPrefix(behind.text, "BDAT ") {
			wire = canonical(text)
		}
		if !ranged {
			return wire, nil
		}
		from, to := 0, len(wire)
		a, b, ok := strings.Cut(part, "-")
		if a != "" {
			from, err = strconv.Atoi(a)
		}
		if b != "" && err == nil {
			to, err = strconv.Atoi(b)
		}
		if !ok || err != nil || from > to || to > len(wire) {
			return "", st.errorf("%q is not a range within %d octets", part, len(wire))
		}
		return wire[from:to], nil
	}
	return st.text + "\r\n", nil
}

// moreRecipients returns the additional recipients of a call with more=n.
func moreRecipients(n int) (to []string) {
	for i := range n {
		to = append(to, fmt.Sprintf("r%d@y.example", i+1))
	}
	return to
}

// body returns the text of a section; a section that is not there is one header line. "name*1000" repeats it, "name\" interprets escapes and drops its last line end,
// so that a body can have bare CR and LF.
func (s *script) body(name string) (string, error) {
	name, times, repeated := strings.Cut(name, "*")
	name, escaped := strings.CutSuffix(name, `\`)
	text, ok := s.sections[name]
	if !ok {
		text = "Subject: " + name + "\n"
	}
	if escaped {
		var err error
		if text, err = unescape(strings.ReplaceAll(text, "\n", "")); err != nil {
			return "", err
		}
	}
	if repeated {
		n, err := strconv.Atoi(times)
		if err != nil {
			return "", err
		}
		text = strings.Repeat(text, n)
	}
	return text, nil
}
