package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// An entry is a message that a relay has queued, as found in its own queue files or records.
type entry struct {
	id   string // the relay's own name for it, as in its reply to the final dot; "" if the reply has none
	from string
	to   []string
	data []byte // header and body as stored, with LF line ends
}

// postfixQueue reads the hold queue, to which the configuration sends everything: a file there is a message that Postfix has
// taken responsibility for.
func postfixQueue(root string) ([]entry, error) {
	return readFolder(filepath.Join(root, "var/spool/postfix/hold"), func(path string) (entry, bool, error) {
		b, err := os.ReadFile(path)
		if err != nil {
			return entry{}, false, err
		}
		e, err := parsePostfix(b)
		e.id = filepath.Base(path)
		return e, true, err
	})
}

// parsePostfix reads a queue file: records of a type, a length in base 128, little-endian, and that many bytes (Postfix,
// src/global/record.c).
func parsePostfix(b []byte) (entry, error) {
	var e entry
	var inMessage, complete bool
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		var n, shift int
		for {
			if len(b) == 0 || shift > 28 {
				return e, errors.New("bad length of a record")
			}
			c := b[0]
			b = b[1:]
			n |= int(c&0x7f) << shift
			shift += 7
			if c&0x80 == 0 {
				break
			}
		}
		if n > len(b) {
			return e, errors.New("a record is truncated")
		}
		text := b[:n]
		b = b[n:]
		switch {
		case kind == 'S':
			e.from = string(text)
		case kind == 'R':
			e.to = append(e.to, string(text))
		case kind == 'M':
			inMessage = true
		case kind == 'X':
			inMessage = false
		case kind == 'N' && inMessage:
			e.data = append(append(e.data, text...), '\n')
		case kind == 'L' && inMessage: // a line that continues in the next record
			e.data = append(e.data, text...)
		case kind == 'E':
			complete = true
		}
	}
	if !complete {
		return e, errors.New("no end record")
	}
	return e, nil
}

// eximQueue reads Exim's input folder: a message is queued once its -H file has its final name.
func eximQueue(root string) ([]entry, error) {
	return readFolder(filepath.Join(root, "var/spool/exim4/input"), func(path string) (entry, bool, error) {
		if !strings.HasSuffix(path, "-H") {
			return entry{}, false, nil
		}
		header, err := os.ReadFile(path)
		if err != nil {
			return entry{}, false, err
		}
		body, err := os.ReadFile(strings.TrimSuffix(path, "-H") + "-D")
		if err != nil {
			return entry{}, false, err
		}
		e, err := parseExim(header, body)
		e.id = strings.TrimSuffix(filepath.Base(path), "-H")
		return e, true, err
	})
}

// parseExim reads the two files of a message (Exim's specification, chapter "Format of spool files").
func parseExim(header, body []byte) (entry, error) {
	var e entry
	lines := strings.SplitAfter(string(header), "\n")
	next := func() string {
		if len(lines) == 0 {
			return ""
		}
		line := lines[0]
		lines = lines[1:]
		return strings.TrimSuffix(line, "\n")
	}
	next() // the file's name
	next() // who received it
	e.from = strings.Trim(next(), "<>")
	for len(lines) > 0 && next() != "XX" { // flags, up to an empty tree of completed recipients
	}
	n, err := strconv.Atoi(next())
	if err != nil {
		return e, fmt.Errorf("number of recipients: %w", err)
	}
	for range n {
		address, _, _ := strings.Cut(next(), " ")
		e.to = append(e.to, address)
	}
	if next() != "" {
		return e, errors.New("no empty line after the recipients")
	}
	rest := strings.Join(lines, "")
	for rest != "" {
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		size, err := strconv.Atoi(rest[:digits])
		if err != nil || digits+2+size > len(rest) {
			return e, fmt.Errorf("a header line is truncated: %.60q", rest)
		}
		flag, text := rest[digits], rest[digits+2:digits+2+size]
		if flag != '*' { // deleted
			e.data = append(e.data, text...)
		}
		rest = rest[digits+2+size:]
	}
	e.data = append(e.data, '\n')
	_, content, found := bytes.Cut(body, []byte("-D\n"))
	if !found {
		return e, errors.New("the -D file does not begin with its own name")
	}
	e.data = append(e.data, content...)
	return e, nil
}

// opensmtpdQueue reads OpenSMTPD's queue: a folder for each message, with its text and a file for each recipient.
func opensmtpdQueue(root string) ([]entry, error) {
	messages, err := filepath.Glob(filepath.Join(root, "var/spool/smtpd/queue/*/*/message"))
	if err != nil {
		return nil, err
	}
	var all []entry
	for _, path := range messages {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		folder := filepath.Dir(path)
		e := entry{id: filepath.Base(folder), data: data}
		envelopes, err := filepath.Glob(filepath.Join(folder, filepath.Base(folder)+"*"))
		if err != nil {
			return nil, err
		}
		for _, path := range envelopes {
			b, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			from, to := parseOpenSMTPD(b)
			e.from = from
			e.to = append(e.to, to)
		}
		all = append(all, e)
	}
	return all, nil
}

// parseOpenSMTPD reads the two addresses of an envelope file.
func parseOpenSMTPD(envelope []byte) (from, to string) {
	for line := range strings.Lines(string(envelope)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "sender":
			from = value
		case "rcpt": // as the client sent it
			to = value
		}
	}
	if from == "@" {
		from = ""
	}
	return from, to
}

// recordFile is where relays that are programs of ours around a library (aiosmtpd, smtp-server, Haraka) write a line for each
// message before they reply 250.
const recordFile = "/var/spool/relay/queue"

// record is such a line.
type record struct {
	ID   string   `json:"id"` // "" if the relay's reply has none
	From string   `json:"from"`
	To   []string `json:"to"`
	Data []byte   `json:"data"` // base64
}

func recorded(root string) ([]entry, error) {
	b, err := os.ReadFile(filepath.Join(root, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []entry
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // still being written
		}
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("%s: %w", recordFile, err)
		}
		all = append(all, entry{id: r.ID, from: r.From, to: r.To, data: bytes.ReplaceAll(r.Data, []byte("\r\n"), []byte("\n"))})
	}
	return all, nil
}

// readFolder reads the files of a queue folder. Relays move complete files into it by rename.
func readFolder(dir string, read func(path string) (e entry, complete bool, err error)) ([]entry, error) {
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []entry
	for _, f := range files {
		if f.IsDir() {
			continue
		}
		path := filepath.Join(dir, f.Name())
		e, complete, err := read(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if complete {
			all = append(all, e)
		}
	}
	return all, nil
}
