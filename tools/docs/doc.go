// Package docs tests what the Markdown files of this repository say. It has no code of its own. It is a module, so that what the
// pages show of other libraries costs nothing else anything.
package docs
